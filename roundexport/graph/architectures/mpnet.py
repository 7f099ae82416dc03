"""MPNet: a learned bias per head and bucket of distances; the model makes it once, every layer adds it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .interface import Architecture, Trace


def forward(
    attention: Any,
    trace: Trace,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor]:
    """In place of MPNetSelfAttention.forward."""
    query, key, value = (
        layer(hidden_states).unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2)
        for layer in (attention.q, attention.k, attention.v)
    )
    out, _none = trace.attend(attention, query, key, value, attention_mask, position_bias=position_bias)
    return (attention.o(out.flatten(2)),)


ARCHITECTURE = Architecture({"MPNetSelfAttention.forward": forward})
