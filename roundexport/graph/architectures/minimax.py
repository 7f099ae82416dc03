"""MiniMax: lightning attention, which is linear attention with a constant decay per head, and a cache of its own class.

    S_t = e^(-slope)·S_(t-1) + k_t ⊗ v_t        o_t = S_tᵀ q_t

transformers keeps S in MiniMaxCache, which no other family has; here a layer hands q, k and v to the cache of a trace.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers.models.minimax import modeling_minimax

from .interface import Architecture, Trace


def whole(model: Any, _: Trace, *args: Any, **kwargs: Any) -> Any:
    """In place of MiniMaxModel.forward, which asks for the class of a cache that is to be used."""
    return type(model).forward(model, *args, **{**kwargs, "use_cache": False})


def forward(
    attention: Any,
    _: Trace,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **__: Any,
) -> tuple[Tensor, None]:
    """In place of MiniMaxLightningAttention.forward."""
    states = attention.act_fn(attention.qkv_proj(hidden_states))
    states = modeling_minimax.apply_mask_to_padding_states(states, attention_mask)
    heads = states.unflatten(-1, (attention.num_attention_heads, 3 * attention.head_dim))
    query, key, value = heads.split(attention.head_dim, dim=-1)
    decay = (-attention.slope_rate.flatten()).expand(query.shape[:3])
    out = attention.norm(past_key_values.attend(attention.layer_idx, query, key, value, decay).flatten(2))
    return attention.out_proj(functional.sigmoid(attention.output_gate(hidden_states)) * out), None


ARCHITECTURE = Architecture({"MiniMaxModel.forward": whole, "MiniMaxLightningAttention.forward": forward}, asks=True)
