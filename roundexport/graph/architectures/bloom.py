"""BLOOM: scores = q·k / sqrt(D) + slope(head) · position(key), the ALiBi bias, which the model makes once a pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .interface import Architecture, Trace


def forward(
    attention: Any,
    trace: Trace,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """In place of BloomAttention.forward."""
    query, key, value = attention._reshape(attention.query_key_value(hidden_states))
    if layer_past is not None:
        key, value = layer_past.update(key, value, attention.layer_idx)
    bias = alibi.reshape(-1, attention.num_heads, 1, alibi.shape[-1])
    out, _none = trace.attend(attention, query, key, value, attention_mask, position_bias=bias)
    return attention.dense(out.flatten(2)) + residual, None


ARCHITECTURE = Architecture({"BloomAttention.forward": forward})
