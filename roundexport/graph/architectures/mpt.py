"""MPT: an ALiBi table for the longest text, of which the last columns are added; q, k and v may be clipped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .interface import Architecture, Trace


def forward(
    attention: Any,
    trace: Trace,
    hidden_states: Tensor,
    position_bias: Tensor,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """In place of MptAttention.forward."""
    mixed = attention.Wqkv(hidden_states)
    if attention.clip_qkv:
        mixed = mixed.clamp(min=-attention.clip_qkv, max=attention.clip_qkv)
    query, key, value = (
        part.unflatten(-1, (attention.n_heads, attention.head_dim)).transpose(1, 2) for part in mixed.chunk(3, dim=2)
    )
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attention.layer_idx)
    # A number that is the same for all keys of a query changes nothing, so positions may count from the first key.
    assert attention_mask is not None
    slopes = position_bias[:, :, -1:] - position_bias[:, :, -2:-1]
    positions = torch.arange(attention_mask.shape[1], device=slopes.device)
    out, _none = trace.attend(
        attention, query, key, value, attention_mask,
        scaling=attention.softmax_scale, position_bias=(slopes * positions)[None],
    )  # fmt: skip
    return attention.out_proj(out.flatten(2)), None


ARCHITECTURE = Architecture({"MptAttention.forward": forward})
