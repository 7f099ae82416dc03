"""Falcon: keys and values are shared by all heads (7B), by groups of them (40B, 180B), or not (RW, with ALiBi).

    scores = (q·k + alibi) / sqrt(D)          the bias is scaled with the scores, so it is handed on divided
    alibi  = slope(head) · position(key)      rounded to bfloat16, as the model was trained; made here, as no runtime
                                              multiplies in bfloat16 on a CPU

The newer decoder repeats keys and values for every head before they are cached; here the cache gets them unrepeated.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers.models.falcon import modeling_falcon

from .interface import Architecture, Trace


def forward(
    attention: Any,
    trace: Trace,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    layer_past: Any = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """In place of FalconAttention.forward."""
    fused, width = attention.query_key_value(hidden_states), attention.head_dim
    if attention.new_decoder_architecture:
        grouped = fused.unflatten(-1, (-1, attention.num_heads // attention.num_kv_heads + 2, width))
        split = grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
    else:
        split = attention._split_heads(fused)
    query, key, value = (part.transpose(1, 2) for part in split)
    bias = None
    if alibi is not None and attention_mask is not None:
        bias = _alibi(attention_mask, attention.num_heads) / math.sqrt(width)
    elif position_embeddings is not None:
        query, key = modeling_falcon.apply_rotary_pos_emb(query, key, *position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, attention.layer_idx)
    out, _none = trace.attend(attention, query, key, value, attention_mask, position_bias=bias)
    return attention.dense(out.flatten(2)), None


def _alibi(mask: Tensor, heads: int) -> Tensor:
    """The bias [B, H, 1, T]; padding counts for nothing."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * head + 1) / power) for head in range(heads - power)]
    positions = ((mask.cumsum(-1) - 1) * mask).float()[:, None, None, :]
    products = torch.tensor(slopes).bfloat16().float()[None, :, None, None] * positions
    return products.bfloat16().float()


ARCHITECTURE = Architecture({"FalconAttention.forward": forward})
