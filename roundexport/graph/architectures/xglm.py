"""XGLM: BART's attention, written out, in a decoder alone; queries are scaled before they meet the keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .interface import Architecture, Trace


def forward(
    attention: Any,
    trace: Trace,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """In place of XGLMAttention.forward."""
    query, key, value = (
        layer(hidden_states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attention.layer_idx)
    out, _none = trace.attend(attention, query, key, value, attention_mask, scaling=attention.scaling)
    return attention.out_proj(out.flatten(2)), None


ARCHITECTURE = Architecture({"XGLMAttention.forward": forward})
