"""Doge: every key has a weight of its own, made from its value, which is added to all scores that it takes part in.

    scores = q·k / sqrt(D) + w(key)        w = exp(A · softplus(dt_proj(value))), one number for each head of keys

A bias that depends on the key alone goes with the key: queries get a 1 behind their D values and keys get w · sqrt(D),
so the cache holds it, and the attention operator adds it.  The width grows to the next multiple of eight, by zeros.

Limits: beyond `keep_window_size` tokens the model forgets the keys with the least weights; a model that takes longer
texts than that is refused.  Experts looked up by products of keys (is_moe) are refused where their tables are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.doge import modeling_doge

from roundexport.errors import UnsupportedError

from .interface import Architecture, Trace

_MULTIPLE = 8


def forward(
    attention: Any,
    trace: Trace,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """In place of DogeAttention.forward."""
    config, width = attention.config, attention.head_dim
    if config.max_position_embeddings > attention.keep_window_size:
        raise UnsupportedError(
            f"Doge: texts of {config.max_position_embeddings} tokens exceed keep_window_size "
            f"{attention.keep_window_size}, beyond which it forgets keys by their weights; that cannot be exported"
        )
    query, key, value = (
        layer(hidden_states).unflatten(-1, (-1, width))
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = attention.q_norm(query).transpose(1, 2), attention.k_norm(key).transpose(1, 2)
    query, key = modeling_doge.apply_rotary_pos_emb(query, key, *position_embeddings)
    weight = torch.exp(attention.A * functional.softplus(attention.dt_proj(value.flatten(2)))).transpose(1, 2)
    zeros = -width % _MULTIPLE or _MULTIPLE
    query = functional.pad(functional.pad(query, (0, 1), value=1.0), (0, zeros - 1))
    key = functional.pad(torch.cat((key, weight[..., None] / attention.scaling), -1), (0, zeros - 1))
    value = value.transpose(1, 2)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attention.layer_idx)
    out, _none = trace.attend(
        attention, query, key, value, attention_mask,
        scaling=attention.scaling, sliding_window=config.sliding_window,
    )  # fmt: skip
    return attention.o_proj(out.flatten(2)), None


ARCHITECTURE = Architecture({"DogeAttention.forward": forward})
