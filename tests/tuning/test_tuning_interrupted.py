"""Tuning stopped by Ctrl-C or a full disk: the next run gives the same bytes (see test_tuning_resume.py for kills)."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from tuning_tools import QUICK, Models, contents

from conftest import tuned
from roundexport.algorithms.common import sign_descent
from roundexport.errors import Interrupted, UnsupportedError, UsageError, WontFitError
from roundexport.storage import safetensors_writer
from roundexport.tuning import checkpointing, run
from roundexport.tuning.block_loop import BlockLoop


def test_a_disk_that_fills_up_keeps_what_is_done(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(tuned(models("llama"), tmp_path / "expected", **QUICK))
    original = safetensors_writer.TensorFileWriter.write

    def write(self: Any, name: str, values: Any) -> None:
        if name.startswith("model.layers.1."):
            raise WontFitError("the disk is full") from OSError(errno.ENOSPC, "No space left on device")
        original(self, name, values)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_writer.TensorFileWriter, "write", write)
        with pytest.raises(WontFitError):
            tuned(models("llama"), tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
    assert contents(tuned(models("llama"), tmp_path / "out", **QUICK)) == expected


def test_an_error_before_the_first_block_keeps_what_was_found(
    models: Models, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {**QUICK, "calibration": str(calibration_text)}

    def fails(error: Exception) -> None:
        def run_blocks(*_: Any) -> None:
            raise error

        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(BlockLoop, "run", run_blocks)
            tuned(models("llama"), tmp_path / "out", **asked)

    fails(UnsupportedError("no call of this kind can be met"))
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch, pytest.raises(TypeError):  # nothing was found yet
        patch.setattr(run, "load_calibration", None)
        tuned(models("llama"), tmp_path / "out", **asked)
    assert not list(tmp_path.iterdir())
    fails(WontFitError("free some"))
    monkeypatch.setattr(run, "load_calibration", None)
    fails(RuntimeError("a driver's"))
    tuned(models("llama"), tmp_path / "out", **asked)


def interrupted(models: Models, out: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> str:
    """Ctrl-C in the middle of the second block."""
    with monkeypatch.context() as patch:
        original = sign_descent.squared_error
        calls: list[int] = []

        def press(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == 20:  # 6 steps and 3 × 2 comparisons per block
                raise KeyboardInterrupt
            return original(*args)

        patch.setattr(sign_descent, "squared_error", press)
        with pytest.raises(Interrupted) as caught:
            tuned(models("llama"), out, **{**QUICK, **changes})
    assert caught.value.exit_code == 130
    return str(caught.value)


def test_ctrl_c_leaves_a_state_from_which_the_same_bytes_come(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(tuned(models("llama"), tmp_path / "expected", **QUICK))
    text = interrupted(models, tmp_path / "out", monkeypatch)
    assert "1 of 2 blocks" in text and "run the same command again" in text
    state = tmp_path / "out.partial"
    assert not (tmp_path / "out").exists()
    assert {path.suffix for path in state.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    assert json.loads((state / "state.json").read_text())["blocks_done"] == 1
    (state / "artifact" / ".manifest.json.partial-1").touch()  # as a run leaves it that is killed in the very end
    monkeypatch.setattr(run, "load_calibration", None)  # samples are not drawn again
    assert contents(tuned(models("llama"), tmp_path / "out", **QUICK)) == expected
    assert not state.exists()


def test_what_activations_cost_is_measured_once(
    models: Models, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {**QUICK, "activations": True, "calibration": str(calibration_text)}
    expected = contents(tuned(models("llama"), tmp_path / "expected", **asked))
    interrupted(models, tmp_path / "out", monkeypatch, **asked)
    monkeypatch.setattr(run, "measure", None)
    assert contents(tuned(models("llama"), tmp_path / "out", **asked)) == expected
    assert b'"activations":' in expected["manifest.json"]


@pytest.mark.parametrize(
    "changes", [{"bits": 3}, {"steps": 7}, {"seed": 1}, {"embedding_bits": None}, {"num_samples": 5}]
)
def test_a_state_of_other_settings_is_refused_with_the_difference(
    changes: dict[str, Any], models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(models, tmp_path / "out", monkeypatch)
    with pytest.raises(UsageError, match=r"other settings \(.*was.*now.*\)"):
        tuned(models("llama"), tmp_path / "out", **{**QUICK, **changes})
    assert (tmp_path / "out.partial").is_dir()


def test_resume_off_begins_anew(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = contents(tuned(models("llama"), tmp_path / "expected", **{**QUICK, "bits": 3}))
    interrupted(models, tmp_path / "out", monkeypatch)
    out = tuned(models("llama"), tmp_path / "out", resume=False, **{**QUICK, "bits": 3})
    assert contents(out) == expected


def test_a_damaged_state_is_refused(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(models, tmp_path / "out", monkeypatch)
    (tmp_path / "out.partial" / checkpointing.STATE).write_text('{"format": "roundexport-tuning/1"')
    with pytest.raises(UsageError, match=r"not valid JSON.*to begin again remove"):
        tuned(models("llama"), tmp_path / "out", **QUICK)


def test_two_runs_do_not_write_one_artifact(models: Models, tmp_path: Path) -> None:
    with checkpointing.open_state(tmp_path / "out", {}, resume=True):
        with pytest.raises(UsageError, match="being written by another run"):
            tuned(models("llama"), tmp_path / "out", **QUICK)
