"""A run whose blocks are shared gives the bytes of one that is not, whatever the model and whoever dies meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cluster_toys import InlinePool, shared
from tuning_tools import Models

from roundexport.cluster.block_parts import _Here
from roundexport.errors import CheckpointError, Interrupted


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama, one block", {"everything": True, "bits": 2, "batch_size": 3}),  # norms in eight bits: another block
        ("llama, one block", {"transform": "teq", "method_settings": ("teq.steps=1",)}),
        ("mixtral", {}),
        ("t5, one block", {}),
    ],
)
def test_the_bytes_are_those_of_a_plain_run(
    family: str, changes: dict[str, Any], models: Models, calibration_text: Path, tmp_path: Path
) -> None:
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


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the driver is gone")])
def test_a_driver_that_ends_leaves_a_state_from_which_any_run_goes_on(
    error: BaseException, models: Models, calibration_text: Path, tmp_path: Path
) -> None:
    model, out = models("llama"), tmp_path / "out"
    expected = shared(model, tmp_path / "plain", calibration_text, None)
    counting = InlinePool(2)
    shared(model, tmp_path / "counted", calibration_text, counting)
    breaks = InlinePool(2, interrupting(counting.messages * 3 // 4, error))  # in the second of two blocks
    with pytest.raises((Interrupted, RuntimeError)):
        shared(model, out, calibration_text, breaks)
    left = out.with_name("out.partial") / "parts"
    assert not list(left.iterdir()), "shared files are left"
    (left / "00001-1").mkdir()
    (left / "00001-1" / "driver-x.aside").touch()  # as a run leaves it that was killed
    pool = None if isinstance(error, KeyboardInterrupt) else InlinePool(4)
    assert shared(model, out, calibration_text, pool) == expected
    assert not out.with_name("out.partial").exists()


def test_a_model_that_a_worker_does_not_see_is_named(tmp_path: Path) -> None:
    task: Any = SimpleNamespace(model=tmp_path / "gone", part=None, bfloat16=False)
    with pytest.raises(CheckpointError, match=r"gone is not there .* every machine of a cluster must see the model"):
        _Here()._model_of(task)
