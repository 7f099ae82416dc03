"""Llama 4: layers without rotary embedding scale their queries by place, which its cache would tell; here positions do.

Beyond f tokens q is multiplied with 1 + a · ln(1 + floor((position + 1) / f)).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama4 import modeling_llama4

from .interface import Architecture, Trace


def layer(
    module: Any,
    _: Trace,
    hidden_states: Tensor,
    *,
    position_ids: Tensor | None = None,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> Tensor:
    """In place of Llama4TextDecoderLayer.forward: positions go on to its attention, which does not get them."""
    both = position_embeddings, position_ids
    found: Tensor = type(module).forward(module, hidden_states, position_embeddings=both, **kwargs)
    return found


def forward(
    attention: Any,
    trace: Trace,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """In place of Llama4TextAttention.forward."""
    angles, positions = position_embeddings
    query, key, value = (
        linear(hidden_states).unflatten(-1, (-1, attention.head_dim))
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if attention.use_rope:
        query, key = modeling_llama4.apply_rotary_emb(query, key, angles)
    if hasattr(attention, "qk_norm"):
        query, key = attention.qk_norm(query), attention.qk_norm(key)
    if attention.attn_temperature_tuning and not attention.use_rope:
        steps = torch.floor((positions.float() + 1.0) / attention.floor_scale)
        query = query * (torch.log1p(steps) * attention.attn_scale + 1.0)[..., None, None]
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attention.layer_idx)
    out, _none = trace.attend(attention, query, key, value, attention_mask, scaling=attention.scaling)
    return attention.o_proj(out.flatten(2)), None


ARCHITECTURE = Architecture({"Llama4TextDecoderLayer.forward": layer, "Llama4TextAttention.forward": forward})
