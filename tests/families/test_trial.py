"""What a trial of a family rests on: weights that eight bits hold, and a comparison that sees a difference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_support import dequantized_model

from roundexport.conversion.tune import tune
from roundexport.errors import UnsupportedError, WrongOutputsError
from roundexport.families import trial
from roundexport.families.comparing import difference
from roundexport.families.configurations import Family, families
from roundexport.families.float64 import in_float64, widened
from roundexport.families.toy import write_model
from roundexport.formats.artifact import Artifact
from roundexport.graph.capture import capture
from roundexport.model.checkpoint import Checkpoint
from roundexport.runtime.loading import load
from roundexport.targets.openvino import lowering


def test_eight_bits_hold_the_weights(tmp_path: Path) -> None:
    for name in ("qwen2_moe", "gpt2"):  # stacked experts; weights stored [K, N]
        folder = tmp_path / name
        write_model(families()[name], folder)
        artifact = Artifact.open(tune(folder, tmp_path / f"{name}.artifact", trial.SETTINGS, progress=False))
        checkpoint = Checkpoint.open(folder)
        for layer in artifact.names():
            stored = checkpoint.float32(f"{layer}.weight")
            turned = stored.T if name == "gpt2" and ".h." in layer else stored
            assert np.array_equal(artifact.linear(layer).dequantize(), turned), layer


def test_a_difference_is_seen(packages: Callable[[str, str], tuple[Path, Path]]) -> None:
    for family in ("llama", "bert"):
        artifact, folder = packages(family, "onnx")
        package, model = load(folder, precise=True), dequantized_model(Artifact.open(artifact))
        found = difference(package, model)  # type: ignore[arg-type]
        assert found.largest < 1e-4 and 0 < found.own < 1e-4
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if p.ndim == 1).mul_(1.1)
        assert difference(package, model).largest > 1e-3  # type: ignore[arg-type]


def test_whatever_is_raised_becomes_a_row(monkeypatch: Any) -> None:
    def raising(error: Exception) -> Callable[..., None]:
        def fails(_: Family, folder: Path) -> None:
            raise type(error)(f"{folder}: {error}")

        return fails

    for error, state, words in (
        (UnsupportedError("no"), "refused", "no"),
        (WrongOutputsError("far"), "failed", "far"),
        (KeyError("x"), "failed", "KeyError: "),
    ):
        monkeypatch.setattr(trial, "write_model", raising(error))
        row = trial.tried(families()["llama"], ("onnx",))
        assert row.outcomes["onnx"].state == state and row.reason.startswith(words), row
        assert "/tmp" not in row.reason


def test_float64_is_float64_throughout_and_leaves_the_weights() -> None:
    """Norms and softmax of modeling files ask for float32; one digit lost there would be in every figure."""

    class Norm(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x).to(torch.float32)
            return torch.softmax(y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True)), -1, dtype=torch.float32)

    torch.manual_seed(0)
    model, x = Norm(64, 64), torch.randn(3, 64)
    before = model.weight.detach().clone()
    weight, bias = (part.detach().numpy().astype(np.float64) for part in (model.weight, model.bias))
    y = x.numpy().astype(np.float64) @ weight.T + bias
    y = np.exp(y / np.sqrt((y**2).mean(-1, keepdims=True)))
    with torch.no_grad(), in_float64(model):
        found = model(widened({"x": x})["x"])
    assert found.dtype == torch.float64 and np.abs(found.numpy() - y / y.sum(-1, keepdims=True)).max() < 1e-15
    assert model.weight.dtype == torch.float32 and torch.equal(model.weight, before)


def test_float64_has_room_for_its_own_smallest_number() -> None:
    class Masked(torch.nn.Linear):  # as XGLM's attention
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return torch.max(y, torch.tensor(torch.finfo(y.dtype).min))

    model, x = Masked(4, 4), torch.ones(1, 4)
    with torch.no_grad(), in_float64(model):
        assert model(x.double()).dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_openvino_converts_what_torch_has_to_decompose_as_a_whole(tmp_path: Path) -> None:
    write_model(families()["deberta_v2"], tmp_path / "model")  # which detaches a tensor in place
    lowering.check(capture(Checkpoint.open(tmp_path / "model")))
