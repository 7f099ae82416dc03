"""What activations in eight bits cost a layer: the rounding is the runtime's, the sum is the model's KL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import tuned
from roundexport.errors import UnsupportedError
from roundexport.formats.artifact import Artifact
from roundexport.kernels import group_matmul
from roundexport.model.blocks import weight_of
from roundexport.model.blockwise_backward import BackwardSettings
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.streamed_model import StreamedModel
from roundexport.quant.spec import LinearInfo, QuantSpec
from roundexport.schemes.activation_loss import measure, rounded

Models = Callable[[str], Path]


def test_the_rounding_is_the_runtimes() -> None:
    x = torch.randn(5, 64) * torch.logspace(-3, 2, 64)
    assert np.array_equal(rounded(x, 32).numpy(), group_matmul.round_activations(x.numpy(), 32))
    assert torch.equal(rounded(x[:, :40], 64), rounded(x[:, :40], 40))  # a block that K cuts short


def test_losses_add_up_to_the_models_kl(models: Models) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    model = checkpoint.load_model()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    layers = {name: (LinearInfo(name, *weight_of(m).shape[::-1]), QuantSpec(4, 32)) for name, m in linears.items()}
    ids = torch.randint(0, model.config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(1))
    found = measure(StreamedModel(checkpoint), ids, layers, BackwardSettings())
    assert set(found.losses) == set(linears) and min(found.losses.values()) > 0
    assert {name.rpartition(".")[2] for names in found.sharing for name in names} == {
        "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj",
    }  # fmt: skip
    with torch.no_grad():
        exact = torch.log_softmax(model(input_ids=ids).logits, -1)
        for module in linears.values():
            module.register_forward_pre_hook(lambda _, args: (rounded(args[0].flatten(0, 1), 32).view_as(args[0]),))
        shipped = torch.log_softmax(model(input_ids=ids).logits, -1)
    kl = float((exact.exp() * (exact - shipped)).sum(-1).mean())
    assert 0.6 < sum(found.losses.values()) / kl < 1.6


def test_tune_records_the_losses_and_refuses_encoders(models: Models, calibration_text: Path, tmp_path: Path) -> None:
    asked = {"algorithm": "rtn", "group_size": 32, "num_samples": 2, "sample_len": 16, "activations": True}
    out = tuned(models("llama, one block"), tmp_path / "out", calibration=str(calibration_text), **asked)
    record = Artifact.open(out).manifest.algorithm["settings"]["activations"]
    assert len(record["losses"]) == 8 and all(loss > 0 for loss in record["losses"].values())
    with pytest.raises(UnsupportedError, match="activations is for decoders"):
        tuned(models("bert"), tmp_path / "bert", calibration=str(calibration_text), **asked)
    with pytest.raises(UnsupportedError, match="target_kl is for decoders"):
        tuned(models("bert"), tmp_path / "bert", algorithm="rtn", target_kl=0.1)
