"""T5: a learned bias per head and bucket of distances, of the first layer, which all layers of a half add.

The model makes it for the keys it has in hand.  A decoder's cache holds keys that it does not, so here the bias is made
for all positions, past ones included.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .interface import Architecture, Trace


def forward(
    attention: Any,
    trace: Trace,
    hidden_states: Tensor,
    mask: Tensor | None = None,
    key_value_states: Tensor | None = None,
    position_bias: Tensor | None = None,
    past_key_values: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None, None]:
    """In place of T5Attention.forward."""
    cross = key_value_states is not None
    source = hidden_states if key_value_states is None else key_value_states
    query, key, value = (
        layer(x).unflatten(-1, (-1, attention.key_value_proj_dim)).transpose(1, 2)
        for layer, x in ((attention.q, hidden_states), (attention.k, source), (attention.v, source))
    )
    past = 0
    if past_key_values is not None:
        past = 0 if cross else past_key_values.get_seq_length()
        cache = past_key_values.cross_attention_cache if cross else past_key_values.self_attention_cache
        key, value = cache.update(key, value, attention.layer_idx)
    bias = position_bias
    if not cross and bias is None:
        new = hidden_states.shape[1]
        bias = attention.compute_bias(new, past + new, device=hidden_states.device, past_seen_tokens=past)
    bias = None if cross else bias
    out, _none = trace.attend(attention, query, key, value, mask, scaling=1.0, position_bias=bias)
    return attention.o(out.flatten(2)), bias, None


ARCHITECTURE = Architecture({"T5Attention.forward": forward}, asks=True)
