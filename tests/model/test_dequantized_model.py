"""The streamed model with an artifact's weights gives what transformers gives with them put in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from openvino_tools import INT4, INT8_ROW, make_artifact

from conftest import FAMILIES, SMALL, build_model
from roundexport.formats.artifact import Artifact
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.dequantized_model import DequantizedModel
from roundexport.quant.spec import LinearInfo, QuantSpec

PHI = {**SMALL, "num_key_value_heads": 4, "partial_rotary_factor": 0.5}  # its lm_head has a bias


def everything(info: LinearInfo) -> QuantSpec:
    return INT8_ROW if info.kind == "embedding" or info.name == "lm_head" else INT4


def blocks_alone(info: LinearInfo) -> QuantSpec | None:
    return INT4 if info.kind == "linear" and info.name != "lm_head" else None


def put_in(checkpoint: Checkpoint, artifact: Artifact) -> torch.nn.Module:
    model = checkpoint.load_model()
    with torch.no_grad():
        for name in artifact.names():
            module: Any = model.get_submodule(name)
            weight = torch.from_numpy(artifact.linear(name).dequantize())
            module.weight.copy_(weight.T if type(module).__name__ == "Conv1D" else weight)
        for name, values in artifact.overrides().items():
            model.get_parameter(name).copy_(torch.from_numpy(np.array(values)))
    return model


@pytest.mark.parametrize("family", [*FAMILIES, "phi"])
@pytest.mark.parametrize("spec_of", [everything, blocks_alone])
def test_it_is_the_model_with_the_artifacts_weights(family: str, spec_of, tmp_path: Path, monkeypatch, models) -> None:
    monkeypatch.setitem(FAMILIES, "phi", ("PhiConfig", "PhiForCausalLM", PHI))
    checkpoint = Checkpoint.open(build_model("phi", tmp_path / "phi") if family == "phi" else models(family))
    norm = next(n for n in checkpoint.names() if n.endswith("weight") and len(checkpoint.shape(n)) == 1)
    overrides = {norm: checkpoint.float32(norm) * np.float32(1.25)}
    artifact = make_artifact(checkpoint, tmp_path / "a", spec_of, overrides)
    found = DequantizedModel(artifact, checkpoint)
    assert found.streamed
    inputs = {"input_ids": torch.randint(4, 380, (2, 9), generator=torch.Generator().manual_seed(0))}
    reference = put_in(checkpoint, artifact)
    with torch.no_grad():
        expected: Any = reference(**inputs)
    wanted = expected.logits if checkpoint.task == "generate" else expected.last_hidden_state
    torch.testing.assert_close(found.run(inputs), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.run(inputs), wanted, rtol=0, atol=1e-5)  # nothing of the first run is left
    assert all(parameter.is_meta for block in found.stack.blocks for parameter in block.parameters())


def test_noise_moves_the_output_a_little(models, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    found = DequantizedModel(make_artifact(checkpoint, tmp_path / "a", everything), checkpoint)
    inputs = {"input_ids": torch.arange(4, 12)[None]}
    still, again, moved = (found.run(inputs, noise) for noise in (0.0, 0.0, 2.0**-20))
    assert torch.equal(still, again)
    assert 1e-8 < float((moved - still).abs().max() / still.std()) < 1e-3


def test_a_model_loaded_whole_has_them_too(models, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("roundexport.model.streamed_model._skeleton", lambda checkpoint: None)
    inputs = {"input_ids": torch.arange(4, 12)[None]}
    checkpoint = Checkpoint.open(models("qwen3"))  # tied
    artifact = make_artifact(checkpoint, tmp_path / "a", everything)
    found = DequantizedModel(artifact, checkpoint)
    assert not found.streamed
    with torch.no_grad():
        expected: Any = put_in(checkpoint, artifact)(**inputs)
    assert isinstance(found.model, transformers.Qwen3ForCausalLM)
    torch.testing.assert_close(found.run(inputs), expected.logits, rtol=0, atol=1e-5)
