"""A run whose blocks are shared gives the bytes of one that is not, whatever the model and whoever dies meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cluster_toys import InlinePool, shared
from tuning_tools import Models
from warm_python import WarmPython

from roundexport.algorithms.rounding import _gram_problem
from roundexport.cluster.block_parts import _Here
from roundexport.errors import CheckpointError, Interrupted
from roundexport.kernels import cholesky


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama, one block", {"everything": True, "bits": 2, "batch_size": 3}),  # norms in eight bits: another block
        ("llama, one block", {"transform": "teq", "method_settings": ("teq.steps=1",)}),
        ("mixtral", {"method_settings": ("gram.fisher_samples=2",)}),  # of attention; experts have none
        ("t5, one block", {}),
    ],
)
def test_the_bytes_are_those_of_a_plain_run(
    family: str, changes: dict[str, Any], models: Models, calibration_text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(_gram_problem, "_WIDE", 1)  # so that problems are solved in parts too
    monkeypatch.setattr(cholesky, "_COLUMNS", 32)
    draw = random.Random(3)
    pool = InlinePool(2, lambda number: draw.random() < 0.1)
    expected = shared(models(family), tmp_path / "plain", calibration_text, None, **changes)
    assert shared(models(family), tmp_path / "shared", calibration_text, pool, **changes) == expected
    assert pool.restarts > 0 and all(pool.by_place), "nobody died, or somebody had nothing to do"


def interrupting(at: int, error: BaseException) -> Callable[[int], bool]:
    def dies(number: int) -> bool:
        if number == at:
            raise error
        return False

    return dies


@pytest.fixture(scope="module")
def undisturbed(
    models: Models, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, bytes], int]:
    """The bytes of a run that is not shared, and how many messages one sends that is, to two places."""
    folder, counting = tmp_path_factory.mktemp("undisturbed"), InlinePool(2)
    expected = shared(models("llama"), folder / "plain", calibration_text, None)
    assert shared(models("llama"), folder / "counted", calibration_text, counting) == expected
    return expected, counting.messages


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the driver is gone")])
def test_a_driver_that_ends_leaves_a_state_from_which_any_run_goes_on(
    error: BaseException, models: Models, calibration_text: Path, tmp_path: Path,
    undisturbed: tuple[dict[str, bytes], int],
) -> None:  # fmt: skip
    model, out, (expected, messages) = models("llama"), tmp_path / "out", undisturbed
    breaks = InlinePool(2, interrupting(messages * 3 // 4, error))  # in the second of two blocks
    with pytest.raises((Interrupted, RuntimeError)):
        shared(model, out, calibration_text, breaks)
    left = out.with_name("out.partial") / "parts"
    assert not list(left.iterdir()), "shared files are left"
    (left / "00001-1").mkdir()
    (left / "00001-1" / "driver-x.aside").touch()  # as a run leaves it that was killed
    pool = None if isinstance(error, KeyboardInterrupt) else InlinePool(4)
    assert shared(model, out, calibration_text, pool) == expected
    assert not out.with_name("out.partial").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
model, out, text, at = sys.argv[1:5]
sys.path.insert(0, sys.argv[5])
from cluster_toys import InlinePool, shared

def dies(number):
    if number == int(at):
        os.kill(os.getpid(), signal.SIGKILL)

shared(Path(model), Path(out), Path(text), InlinePool(2, dies))
"""


@pytest.mark.skipif(os.name != "posix", reason="the driver is killed by a signal")
def test_a_driver_that_is_killed_leaves_a_state_from_which_any_run_goes_on(
    models: Models, calibration_text: Path, tmp_path: Path, warm: WarmPython, undisturbed: tuple[dict[str, bytes], int]
) -> None:
    model, out, left = models("llama"), tmp_path / "out", tmp_path / "out.partial"
    expected, messages = undisturbed
    at = messages * 3 // 4  # in the second of two blocks
    done = warm.run(KILLED, model, out, calibration_text, str(at), Path(__file__).parent.parent)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert json.loads((left / "state.json").read_text())["blocks_done"] == 1
    assert list((left / "parts").rglob("*.safetensors")), "nothing was under way"
    assert shared(model, out, calibration_text, InlinePool(3)) == expected
    assert not left.exists()


def test_a_model_that_a_worker_does_not_see_is_named(tmp_path: Path) -> None:
    task: Any = SimpleNamespace(model=tmp_path / "gone", part=None, bfloat16=False)
    for source in (str(tmp_path / "gone"), "owner/name"):
        with pytest.raises(
            CheckpointError, match=r"gone is not there .* every machine of a cluster must see the model"
        ):
            _Here()._model_of(task, source)


def test_workers_in_another_folder_find_a_model_that_was_named_from_here(
    models: Models, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere(InlinePool):
        def submit(self, place: int, message: bytes) -> Future[bytes]:
            with contextlib.chdir("/"):
                return super().submit(place, message)

    (tmp_path / "model").symlink_to(models("llama, one block"))
    monkeypatch.chdir(tmp_path)
    assert shared("model", Path("out"), calibration_text, Elsewhere(1))
