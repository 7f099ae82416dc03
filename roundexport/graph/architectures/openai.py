"""The first GPT: attention and masks of its own, and positions that are given; it keeps no cache itself.

    scores = q·k / sqrt(D), causal          keys come transposed, [B, H, D, S]

Its model turns the mask into a summand, so the part between embeddings and head is spelled out here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.masking_utils import causal_mask_function
from transformers.modeling_outputs import BaseModelOutput

from .interface import Architecture, Trace, heads_first


def forward(
    model: Any, trace: Trace, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **_: Any
) -> BaseModelOutput:
    """In place of OpenAIGPTModel.forward."""
    mask = trace.make_mask(attention_mask=attention_mask, mask_function=causal_mask_function)
    hidden = model.tokens_embed(input_ids) + model.positions_embed(position_ids)
    for block in model.h:
        hidden = block(hidden, mask)[0]
    return BaseModelOutput(last_hidden_state=hidden)


def attend(
    attention: Any, trace: Trace, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *_: Any
) -> list[Tensor]:
    """In place of Attention._attn."""
    scale = None if attention.scale else 1.0
    return [heads_first(trace.attend(attention, query, key.transpose(-1, -2), value, mask, scaling=scale)[0])]


ARCHITECTURE = Architecture({"OpenAIGPTModel.forward": forward, "Attention._attn": attend})
