"""Attention in one operator for each layer, rotary embedding included: in the graph, and beside transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_tools import spread_weights

from conftest import DECODERS
from roundexport.graph.capture import capture
from roundexport.model.checkpoint import Checkpoint
from roundexport.runtime.generation import Decoder
from roundexport.runtime.loading import load
from roundexport.targets.export import export
from roundexport.targets.fused_attention import fused_attention
from roundexport.targets.onnx.graph import integer
from roundexport.targets.onnx.lowering import _with_attention

SIZES: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 3,
}  # fmt: skip


def part(factor: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": factor}}


LLAMA4 = {
    "moe_layers": [], "intermediate_size_mlp": 128, "attention_chunk_size": 8, "no_rope_layers": [1, 0],
    "floor_scale": 4, "num_hidden_layers": 2,
}  # fmt: skip
# class -> (what the config says, columns of the table inside the operator or None, pairs side by side)
INSIDE: dict[str, tuple[str, dict[str, Any], int | None, int]] = {
    "a part": ("StableLm", part(0.5), 8, 0),
    "a part of a width that has no table": ("GPTNeoX", part(0.25), None, 0),
    "pairs of a part": ("Glm", part(0.5), 8, 1),
    "pairs, filled up": ("Glm", part(0.75), 16, 1),
    "all pairs": ("Cohere", {}, 16, 1),
    "normed after the turn": ("NanoChat", {}, 16, 0),
    "heads too narrow": ("Llama", {"head_dim": 24}, None, 0),
}


def built(name: str, values: dict[str, Any], folder: Path) -> torch.nn.Module:
    import transformers

    config = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config(**{**SIZES, **values})).eval()
    spread_weights(model)
    model.save_pretrained(folder)
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("row", INSIDE)
def test_which_rotary_embeddings_go_into_the_operator(row: str, tmp_path: Path) -> None:
    name, values, columns, interleaved = INSIDE[row]
    built(name, values, tmp_path)
    editor = _with_attention(capture(Checkpoint.open(tmp_path)), 64)
    (node,) = (node for node in editor.graph if node.op_type == "GroupQueryAttention")
    turned = [node for node in editor.graph if node.op_type == "RotaryEmbedding"]
    assert integer(node, "do_rotary") == (columns is not None) and len(turned) == (0 if columns else 2)
    assert integer(node, "rotary_interleaved") == interleaved
    if columns:
        assert [value.shape[-1] for value in node.inputs[7:9]] == [columns] * 2


RUN: dict[str, tuple[str, dict[str, Any]]] = {
    "pairs of a part": ("Glm", part(0.75)),
    "heads of 20": ("Llama", {"head_dim": 20}),
    "chunks": ("Llama4", LLAMA4),
}
CHUNKS = ("chunks", "openvino")  # where a layer attends in chunks it is spelled out; the second does not


@torch.no_grad()
@pytest.mark.parametrize(("row", "target"), [(row, target) for row in RUN for target in ("onnx", "openvino")])
def test_it_is_transformers_answer(row: str, target: str, tmp_path: Path) -> None:
    model = built(*RUN[row], tmp_path / "m")
    export(tmp_path / "m", tmp_path / "p", to=target, progress=False)
    counted = fused_attention(tmp_path / "p")
    assert counted.layers == model.config.num_hidden_layers
    assert counted.fused == counted.layers - ((row, target) == CHUNKS)
    package, ids = load(tmp_path / "p", precise=True), np.random.default_rng(1).integers(4, 384, (2, 24))
    assert isinstance(package, Decoder)
    expected = model(torch.tensor(ids)).logits
    parts = []
    with package.start(rows=2) as session:
        rows = dict(zip(session.add(2), ids, strict=True))
        for begin, end in ((0, 6), *((place, place + 1) for place in range(6, 24))):
            parts.append(session.extend({number: row[begin:end].tolist() for number, row in rows.items()}).copy())
    for found, wanted in ((package.logits(ids), expected), (np.stack(parts, 1), expected[:, 5:])):
        assert float(np.abs(found - wanted.numpy()).max() / expected.std()) < 1e-4


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_counted_in_packages(target: str, packages: Callable[[str, str], tuple[Path, Path]]) -> None:
    for family in DECODERS[:2]:
        counted = fused_attention(packages(family, target)[1])
        assert (counted.fused, counted.spelled_out) == (2, 0)
        assert (counted.rotary_inside, counted.rotary_operators) == ((2, 0) if target == "onnx" else (0, 4))
        assert str(counted).startswith("2 of 2 attention layers in one operator")
