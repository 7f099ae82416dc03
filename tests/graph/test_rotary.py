"""Rotary embeddings: which functions are recognized and as what, whole heads, and heads whose order is free."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from captured_reference import Reference
from checkpoint_tools import spread_weights

from roundexport.graph.capture import Capture, capture
from roundexport.graph.rotary import formula, recognized
from roundexport.graph.rotary_order import orderless
from roundexport.model.checkpoint import Checkpoint

# family -> (layout of the angles, interleaved, backwards, put in halves on the way, a part of the head, axis of heads)
FUNCTIONS: dict[str, tuple[str, bool, bool, bool, bool, int]] = {
    "llama": ("halves", False, False, False, False, 1),
    "phi3": ("halves", False, False, False, True, 1),
    "gpt_oss": ("once", False, False, False, False, 1),
    "gemma4": ("halves", False, False, False, False, 1),
    "glm": ("halves", True, False, False, True, 1),
    "ernie4_5": ("halves", True, False, False, False, 1),
    "cohere": ("twice", True, False, False, False, 1),
    "gptj": ("once", True, False, False, False, 2),
    "nanochat": ("halves", False, True, False, False, 1),
}


def function_of(family: str, name: str = "apply_rotary_pos_emb") -> Callable[..., Any]:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    found: Callable[..., Any] = getattr(module, name)
    return found


@pytest.mark.parametrize("family", FUNCTIONS)
def test_a_function_is_known_by_what_it_gives(family: str) -> None:
    form = recognized(function_of(family))
    assert form is not None
    expected = FUNCTIONS[family]
    assert (form.layout, form.interleaved, form.backwards, form.sorted, form.partial, form.heads_axis) == expected


def test_pairs_that_are_put_in_halves_on_the_way_are_known() -> None:
    form = recognized(function_of("deepseek_v3", "apply_rotary_pos_emb_interleave"))
    assert form is not None and form.interleaved and form.sorted and form.layout == "halves"


@pytest.mark.parametrize("wrong", [
    lambda q, k, cos, sin: (q * cos[:, None], k),
    lambda q, k, cos, sin: (formula(q, cos, sin, False), k),
    lambda q, k, cos, sin: (formula(q, cos, sin, False), formula(k, cos, sin, True)),
    lambda q, k: (q, k),
    max,
])  # fmt: skip
def test_what_turns_otherwise_is_left_alone(wrong: Callable[..., Any]) -> None:
    assert recognized(wrong) is None


SIZES: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 3,
}  # fmt: skip
HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
# class -> (what the config says, columns of the table, pairs side by side, whether their order is free)
MODELS: dict[str, tuple[dict[str, Any], int, bool, bool]] = {
    "Phi": ({**HALF, "num_key_value_heads": 4}, 4, False, True),
    "GPTNeoX": (HALF, 4, False, True),
    "Glm": (HALF, 4, True, True),
    "Cohere": ({"use_qk_norm": True}, 8, True, True),
    "NanoChat": ({}, 8, False, True),
    "HunYuanDenseV1": ({"eod_token_id": 0}, 8, False, False),
    "Gemma3": ({"layer_types": ["full_attention"], "query_pre_attn_scalar": 16}, 8, False, True),
}


def captured(name: str, folder: Path) -> tuple[Capture, torch.nn.Module, Checkpoint]:
    import transformers

    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config(**{**SIZES, **MODELS[name][0]})).eval()
    spread_weights(model)
    model.save_pretrained(folder)
    checkpoint = Checkpoint.open(folder)
    return capture(checkpoint), model, checkpoint


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_queries_and_keys_are_turned_by_one_placeholder_each(name: str, tmp_path: Path) -> None:
    got, model, checkpoint = captured(name, tmp_path)
    _, columns, interleaved, free = MODELS[name]
    ropes = [node for node in got.program.graph.nodes if node.target is torch.ops.roundexport.rope.default]
    assert len(ropes) == 2 and all(node.meta["val"].shape[-1] == 16 for node in ropes), "heads are turned whole"
    assert [table.cos.shape[-1] for table in got.rope_tables] == [columns] and len(got.rope_table_of) == 2
    assert all(node.args[4] == interleaved for node in ropes)
    assert (orderless(got.program) == {0, 1}) == free
    ids = torch.arange(4, 52).view(2, 24)
    found = Reference(got, checkpoint).run(ids, torch.ones_like(ids), torch.arange(24).expand(2, 24))
    expected = model(ids).logits
    assert float((found - expected).abs().max() / expected.std()) < 1e-4
