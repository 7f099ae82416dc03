"""What `tune` refuses before any work: settings, weights, memory and disk; nothing is left behind."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tuning_tools import QUICK, Models, contents

from conftest import build_model, tuned
from roundexport.calibration import self_generated
from roundexport.errors import CheckpointError, SpecError, UsageError, WontFitError
from roundexport.model.checkpoint import Checkpoint
from roundexport.tuning.job import Job
from roundexport.tuning.settings import TuneSettings


def refused(tmp_path: Path, kind: type[Exception], model: Path, **changes: Any) -> str:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(kind) as caught:
        tuned(model, tmp_path / "out", **{**QUICK, **changes})
    assert sorted(tmp_path.iterdir()) == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"bits": 5}, SpecError, "bits 5"),
        ({"group_size": 48}, SpecError, "group_size 48"),
        ({"target_bits": 2.0}, UsageError, "2.000 bits per weight cannot be met"),
        ({"rules": "missing.json"}, UsageError, "rules missing.json cannot be read"),
        ({"embedding_bits": 2}, UsageError, "embedding_bits"),
        ({"algorithm": "magic"}, UsageError, "unknown rounding method 'magic'; known: bct, "),
        ({"steps": 0}, UsageError, "steps"),
        ({"algorithm": "optimal_rtn", "transform": "activation_smoothing"}, UsageError, "optimal_rtn has no steps"),
        ({"device": "warp"}, UsageError, "device 'warp'"),
        ({"device": "cuda:99"}, UsageError, "device 'cuda:99'"),
        ({"calibration": "missing.txt"}, UsageError, "no such file"),
        ({"num_samples": 0}, UsageError, "num_samples must be"),
    ],
)
def test_parameters_without_sense(
    changes: dict[str, Any], kind: type[Exception], words: str, models: Models, tmp_path: Path
) -> None:
    assert words in refused(tmp_path, kind, models("llama"), **changes)


@pytest.mark.parametrize("recipe", ["default", "best"])
def test_steps_that_a_mixture_of_experts_cannot_have(recipe: str, models: Models) -> None:
    asked = TuneSettings(recipe=recipe, group_size=32)
    with pytest.raises(UsageError, match=r"steps of gram .* mixtures of experts.*leave --steps out"):
        Job.of(models("mixtral"), dataclasses.replace(asked, steps=3))
    Job.of(models("mixtral"), asked)


def test_activations_are_not_measured_before_a_transform_changes_them(models: Models) -> None:
    asked = TuneSettings(activations=True, transform="activation_smoothing", group_size=32)
    with pytest.raises(UsageError, match="which transform activation_smoothing changes; take one of them"):
        Job.of(models("llama"), asked)


def test_an_output_that_exists(models: Models, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "exists already" in refused(tmp_path, UsageError, models("llama"))


def test_calibration_text_shorter_than_one_sample(models: Models, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a few words", encoding="utf-8")
    assert "one sample takes 32" in refused(tmp_path, UsageError, models("llama"), calibration=str(text))


@pytest.mark.parametrize(
    ("parameter", "value", "words"),
    [
        ("model.layers.1.mlp.down_proj.weight", float("nan"), "model.layers.1.mlp.down_proj: its weight holds"),
        ("model.norm.weight", float("inf"), "model.norm: its weight holds"),
        ("model.layers.0.mlp.up_proj.weight", 1e6, "model.layers.0.mlp.up_proj: weights up to 1e+06 may need"),
    ],
)
def test_weights_that_cannot_be_quantized_are_named(
    parameter: str, value: float, words: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from safetensors.numpy import load_file, save_file

    folder = build_model("llama", tmp_path_factory.mktemp("broken"))
    weights = load_file(folder / "model.safetensors")
    weights[parameter] = np.array(weights[parameter])
    weights[parameter].flat[3] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert words in refused(tmp_path, SpecError if value == 1e6 else CheckpointError, folder)


def test_float32_scales_hold_weights_that_float16_scales_do_not(models: Models) -> None:
    from roundexport.schemes.layer_plan import make_plan

    model = Checkpoint.open(models("llama")).load_model().requires_grad_(False)
    model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = 1e6
    with pytest.raises(SpecError, match="--scale-dtype float32"):
        make_plan(model, TuneSettings(group_size=32).schemes)
    make_plan(model, TuneSettings(group_size=32, scale_dtype="float32").schemes)


def test_a_model_that_cannot_write_its_samples_within_max_ram(
    models: Models, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_generated, "write_samples", None)
    monkeypatch.setattr(self_generated, "_remembered", lambda key: None)
    text = refused(tmp_path, WontFitError, models("llama"), max_ram=0.5)
    assert "calibration self, for which the model writes its samples, takes" in text and "give a text file" in text
    monkeypatch.undo()
    tuned(models("llama"), tmp_path / "out", **{**QUICK, "max_ram": 0.5, "calibration": str(calibration_text)})


def test_a_disk_that_cannot_hold_the_run_is_told_before_it_begins(
    models: Models, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SimpleNamespace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    options = {**QUICK, "algorithm": "gram", "num_samples": 512, "calibration": str(calibration_text)}
    told = r"GiB of disk \(the artifact 0\.00, hidden states 0\.02\), 0\.00 GiB are free; free some"
    with pytest.raises(WontFitError, match=told):
        tuned(models("llama"), tmp_path / "out", **options)
    assert (tmp_path / "out.partial" / "calibration.safetensors").exists()  # for the call that has more


def test_a_budget_changes_no_byte_and_an_estimate_beyond_it_is_told(
    models: Models, calibration_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**QUICK, "calibration": str(calibration_text)}
    expected = contents(tuned(models("llama"), tmp_path / "free", **options))
    found = contents(tuned(models("llama"), tmp_path / "tight", max_ram=0.01, **{**options, "progress": True}))
    assert found == expected
    assert "more than max_ram 0.01" in " ".join(capsys.readouterr().err.split())


def test_a_disk_that_is_full_from_the_start(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert "the disk is full" in refused(tmp_path, WontFitError, models("llama"))
