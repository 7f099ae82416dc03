"""Encoders whose files have other names and packed projections: read as transformers reads them, and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from captured_reference import Reference
from checkpoint_tools import assert_holds_the_model
from safetensors.torch import load_file, save_file

from roundexport.errors import CheckpointError
from roundexport.families.configurations import families
from roundexport.families.toy import write_model
from roundexport.graph.capture import capture
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.streamed_model import StreamedModel

SMALL: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 3,
}  # fmt: skip
FAMILIES = ("NomicBert", "Gte", "JinaEmbeddingsV3")


def build(name: str, folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**SMALL)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    return model  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_model(name: str, tmp_path: Path) -> None:
    model, ids = build(name, tmp_path), torch.arange(4, 52).view(2, 24)
    assert any("qkv" in stored for stored in load_file(tmp_path / "model.safetensors"))
    checkpoint = Checkpoint.open(tmp_path)
    assert_holds_the_model(checkpoint)
    assert checkpoint.names() == sorted(model.state_dict())
    assert checkpoint.float32(checkpoint.names()[-1], (0, 1)).shape[0] == 1
    assert StreamedModel(checkpoint).streamed
    got = capture(checkpoint)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    found = Reference(got, checkpoint).run(*(inputs[name] for name in got.inputs))
    found = found[0] if isinstance(found, tuple) else found
    expected = model(ids).last_hidden_state
    assert float((found - expected).abs().max() / expected.std()) < 1e-4


def test_nemotron_h_is_called_backbone_in_its_file(tmp_path: Path) -> None:
    write_model(families()["nemotron_h"], tmp_path)
    assert all(stored.startswith(("backbone.", "lm_head.")) for stored in load_file(tmp_path / "model.safetensors"))
    assert_holds_the_model(Checkpoint.open(tmp_path))


def test_rows_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    build("NomicBert", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "Wqkv" in name)
    save_file({**tensors, name: tensors[name][:-1].clone()}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="its rows are not those of 3 matrices"):
        Checkpoint.open(tmp_path)
