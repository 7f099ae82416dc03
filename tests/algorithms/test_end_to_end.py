"""Tuning the whole model: the loss goes down, windows work, the artifact is whole, encoders and tied heads too."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import tuned
from roundexport import TuneSettings
from roundexport.algorithms.finishers import _window, end_to_end
from roundexport.algorithms.interface import BlockSize
from roundexport.errors import UsageError
from roundexport.formats.artifact import Artifact
from roundexport.tuning import finisher_state
from roundexport.tuning.job import Job

Models = Callable[[str], Path]
QUICK: dict[str, Any] = {
    "algorithm": "rtn", "bits": 3, "group_size": 32, "num_samples": 8, "sample_len": 32, "batch_size": 4, "steps": 25,
    "finish": "end_to_end",
}  # fmt: skip


PLAIN = {name: value for name, value in QUICK.items() if name not in {"finish", "steps"}}  # which are the finish's


@pytest.fixture(scope="module")
def finished(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``finished("llama")``: its artifact by QUICK, made once; not to be changed."""
    root = tmp_path_factory.mktemp("finished")

    def get(family: str) -> Path:
        return root / family if (root / family).exists() else tuned(models(family), root / family, **QUICK)

    return get


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gemma3"])
def test_the_loss_goes_down_and_integers_keep_their_scheme(
    family: str, models: Models, finished: Callable[[str], Path], tmp_path: Path
) -> None:
    plain = Artifact.open(tuned(models(family), tmp_path / "plain", **PLAIN))
    done = Artifact.open(finished(family))
    finish = done.manifest.algorithm["settings"]["finish"]
    [(before, after)] = finish["losses"]
    assert 0 < after < 0.9 * before
    assert [done.entry(name).spec for name in done.names()] == [plain.entry(name).spec for name in plain.names()]
    changed = {name for name in done.names() if not done.linear(name).equals(plain.linear(name))}
    assert changed == {name for name in done.names() if done.entry(name).spec.bits == 3}  # all but the tables
    assert done.overrides()


def test_windows_are_tuned_one_after_the_other(models: Models, tmp_path: Path) -> None:
    done = Artifact.open(tuned(models("llama"), tmp_path / "done", method_settings=("end_to_end.window=1",), **QUICK))
    losses = done.manifest.algorithm["settings"]["finish"]["losses"]
    assert len(losses) == 2 and all(after < before for before, after in losses)


def test_the_loss_reported_is_that_of_the_artifact(models: Models, finished: Callable[[str], Path]) -> None:
    """KL computed anew by transformers from dequantized weights and overrides, on the samples of the run."""
    from roundexport.calibration.samples import load_calibration
    from roundexport.calibration.self_generated import beginnings, write_samples
    from roundexport.model.checkpoint import Checkpoint

    done = Artifact.open(finished("llama"))
    checkpoint = Checkpoint.open(models("llama"))
    ids = load_calibration(checkpoint, "self", num_samples=8, sample_len=32).ids
    written = write_samples(checkpoint.load_model(), checkpoint, beginnings(checkpoint, 3 * 8, 32), 32, 43)
    ids = np.concatenate([ids, written])
    reference, model = (checkpoint.load_model().requires_grad_(False) for _ in range(2))
    for name in done.names():
        model.get_submodule(name).weight.copy_(torch.from_numpy(done.linear(name).dequantize()))
    for name, values in done.overrides().items():
        model.get_parameter(name).copy_(torch.tensor(values))
    p, q = (torch.log_softmax(m(input_ids=torch.from_numpy(ids)).logits[:, :-1], -1) for m in (reference, model))
    [(_, after)] = done.manifest.algorithm["settings"]["finish"]["losses"]
    assert (p.exp() * (p - q)).sum(-1).mean().item() == pytest.approx(after, rel=1e-3)


def test_what_does_not_finish_is_refused(models: Models, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'rtn' is a rounding method, not a finisher; known: end_to_end"):
        tuned(models("llama"), tmp_path / "out", **{**QUICK, "finish": "rtn"})
    assert not (tmp_path / "out.partial").exists()


def test_killed_while_it_finishes_it_goes_on(
    models: Models, finished: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    step = _window.Window._step

    def dies(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        step(*arguments)

    monkeypatch.setattr(finisher_state, "_PERIOD_S", 0.0)
    with monkeypatch.context() as broken, pytest.raises(BaseException, match="run the same command"):
        broken.setattr(_window.Window, "_step", dies)
        tuned(models("llama"), tmp_path / "out", **QUICK)
    assert json.loads((tmp_path / "out.partial" / "state.json").read_text())["blocks_done"] == 2
    with monkeypatch.context() as counted:
        calls[:] = [1] * 100
        counted.setattr(_window.Window, "_step", dies)
        tuned(models("llama"), tmp_path / "out", **QUICK)
    assert len(calls) - 100 == QUICK["steps"] - 11  # those before the kill are not run again
    for file in finished("llama").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_a_checkpointed_graph_gives_the_same_bytes(
    models: Models, finished: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finished("llama")
    monkeypatch.setattr(_window, "_GRAPH_BYTES", 0)
    tuned(models("llama"), tmp_path / "pieces", **QUICK)
    for file in whole.iterdir():
        assert file.read_bytes() == (tmp_path / "pieces" / file.name).read_bytes()


def test_the_window_is_the_largest_that_memory_holds() -> None:
    size = BlockSize(1 << 24, 1 << 14, 4096, 1024, 128, 512, blocks=28, vocabulary=1 << 15)
    plain = end_to_end.EndToEndSettings()
    assert plain.fitted(size) is plain
    chosen = plain.fitted(dataclasses.replace(size, max_bytes=8 << 30))
    assert chosen.window is not None and 1 < chosen.window < 28
    needed = [4 * dataclasses.replace(plain, window=chosen.window + more).peak_floats(size) for more in (0, 1)]
    assert needed[0] < 8 << 30 < needed[1] + (700 << 20)
    small = plain.fitted(dataclasses.replace(size, max_bytes=1 << 20))
    assert (small.window, small.written, chosen.written) == (1, 0, 3)
    assert plain.fitted(dataclasses.replace(size, max_bytes=1 << 40)) == plain


@pytest.mark.parametrize(("flag", "group", "whole"), [(None, None, False), (64, None, True), (None, 1 << 36, True)])
def test_windows_fit_the_machine_where_nobody_names_a_limit(
    flag: float | None, group: int | None, whole: bool, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=1 << 20))
    monkeypatch.setattr("roundexport.environment.memory.memory_limit", lambda: group)
    job = Job.of(models("llama"), TuneSettings(finish="end_to_end", group_size=32, max_ram=flag))
    assert job.finisher is not None and isinstance(job.finisher.settings, end_to_end.EndToEndSettings)
    assert job.finisher.settings.window == (None if whole else 1)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"window": 0}, {"written": -1}, {"rate": 2.0}, {"scale_rate": -0.1}, {"last": 0}]
)
def test_settings_without_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        end_to_end.EndToEndSettings(**wrong)


def test_the_last_block_alone_as_lfq_has_it(models: Models, tmp_path: Path) -> None:
    plain = Artifact.open(tuned(models("llama"), tmp_path / "plain", **PLAIN))
    chosen = ("end_to_end.window=1", "end_to_end.last=1")
    done = Artifact.open(tuned(models("llama"), tmp_path / "done", method_settings=chosen, **QUICK))
    [(before, after)] = done.manifest.algorithm["settings"]["finish"]["losses"]
    assert after < before
    changed = {name for name in done.names() if not done.linear(name).equals(plain.linear(name))}
    assert changed and all(".layers.1." in name for name in changed)


def test_scales_alone_leave_every_code_where_it_is(models: Models, tmp_path: Path) -> None:
    plain = Artifact.open(tuned(models("llama"), tmp_path / "plain", **PLAIN))
    done = Artifact.open(tuned(models("llama"), tmp_path / "done", method_settings=("end_to_end.rate=0",), **QUICK))
    [(before, after)] = done.manifest.algorithm["settings"]["finish"]["losses"]
    assert after < before
    for name in done.names():
        assert np.array_equal(done.linear(name).unpack(), plain.linear(name).unpack())
    assert any(not np.array_equal(done.linear(n).scales, plain.linear(n).scales) for n in done.names())


def test_behind_a_transformation_positions_start_at_the_codes(models: Models, tmp_path: Path, monkeypatch: Any) -> None:
    starts: list[float] = []
    original = _window.Window.tune

    def spy(window: Any, *arguments: Any) -> Any:
        starts.extend(float((cell.position - cell.centered_codes).abs().max()) for cell in window._cells.values())
        return original(window, *arguments)

    monkeypatch.setattr(_window.Window, "tune", spy)
    tuned(models("llama"), tmp_path / "done", transform="teq", **QUICK)
    assert starts and max(starts) < 1e-3
    starts.clear()
    tuned(models("llama"), tmp_path / "plain", **QUICK)
    assert max(starts) > 0.1
