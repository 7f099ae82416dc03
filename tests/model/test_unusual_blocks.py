"""Blocks called in unusual ways: with a tensor per sample and head, with samples strung together, with states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from roundexport.families.configurations import families
from roundexport.model.block_call import capture_calls, first_hidden, run_all
from roundexport.model.blocks import find_stack
from roundexport.model.experts import split_experts
from roundexport.model.language_model import LanguageModel
from roundexport.model.staged_forward import StagedForward

CPU = torch.device("cpu")
IDS = torch.randint(4, 380, (5, 16), generator=torch.Generator().manual_seed(1))
SMALL: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "num_key_value_heads": 2,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
MODELS = {
    "bloom, biases per sample and head": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=384, hidden_size=32, n_layer=2, n_head=4)
    ),
    "opt, samples strung together": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32)
    ),
    "qwen2-vl, a head of ours": lambda: LanguageModel(
        transformers.Qwen2VLConfig(text_config={**SMALL, **MROPE}, vision_config={"depth": 1}).text_config
    ),
}


def of_family(name: str, **changes: Any) -> torch.nn.Module:
    family = families()[name]
    config = getattr(transformers, family.config)(**{**family.values, **changes})
    model: torch.nn.Module = getattr(transformers, family.model)(config)
    split_experts(model)
    return model


MODELS |= {
    "mamba, a weight that is read": lambda: of_family("mamba"),
    "minimax, a cache of its own": lambda: of_family("minimax"),
    "recurrent gemma, states in the layer": lambda: of_family("recurrent_gemma"),
    "olmo-hybrid, blocks of two kinds": lambda: of_family("olmo_hybrid"),
    "dbrx, experts below each other": lambda: of_family("dbrx"),
    "llama 4, experts' inputs weighed": lambda: of_family("llama4_moe", moe_layers=[0]),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_block_by_itself_gives_what_it_gives_in_the_model(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval().requires_grad_(False)
    stack = find_stack(model)
    calls, hidden = capture_calls(model, stack, IDS), first_hidden(model, stack, IDS, 2)
    seen: list[torch.Tensor] = []
    handle = stack.blocks[0].register_forward_hook(
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    model(IDS)
    handle.remove()
    assert torch.allclose(run_all(stack.blocks[0], calls[0], hidden, 2, CPU), seen[0], atol=1e-5)
    with StagedForward(stack.blocks[0], calls[0], hidden, hidden, 2, CPU) as walk:
        for stage in range(len(walk.stages)):
            shapes = [tuple(quantized.shape[:2]) for quantized, _ in walk.inputs(stage)]
            assert shapes == [(2, 16), (2, 16), (1, 16)]
