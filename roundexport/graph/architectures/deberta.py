"""DeBERTa's first version: attention as in the second (deberta_v2.py), projections in one, distances not in buckets.

    scores = (q·k + q·Pk(i-j) + k·Pq(i-j)) / sqrt(f·D)       f = 1 + how many of the two terms there are

The model takes as many rows of its table as the text is long; here distances are clamped to the whole table, which
reads the same rows.  Heads that are mixed before or behind the softmax (talking_head) are refused.

Source: arXiv 2006.03654, and DisentangledSelfAttention of transformers' deberta.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from roundexport.errors import UnsupportedError

from .deberta_v2 import attend, distance_bias, keep_mask
from .interface import Architecture, Trace


def forward(
    attention: Any,
    trace: Trace,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple[Tensor, None]:
    """In place of DisentangledSelfAttention.forward."""
    if attention.head_logits_proj is not None:
        raise UnsupportedError("DeBERTa with talking_head mixes its heads' scores; that cannot be exported")
    heads = attention.num_attention_heads
    query, key, value = attention.in_proj(hidden_states).unflatten(-1, (heads, -1)).transpose(1, 2).chunk(3, -1)
    query = query + attention.q_bias.view(1, heads, 1, -1)
    value = value + attention.v_bias.view(1, heads, 1, -1)
    projections = {"c2p": getattr(attention, "pos_proj", None), "p2c": getattr(attention, "pos_q_proj", None)}
    bias = None
    if attention.relative_attention and relative_pos is not None and rel_embeddings is not None:
        span = attention.max_relative_positions
        used = {kind: layer for kind, layer in projections.items() if layer is not None}
        tables = {
            kind: layer(rel_embeddings).unflatten(-1, (heads, -1)).transpose(0, 1) for kind, layer in used.items()
        }
        bias = distance_bias(query, key, relative_pos[:, None], span, tables)
    return attend(trace, attention, (query, key, value), attention_mask, bias, len(attention.pos_att_type))


ARCHITECTURE = Architecture(
    {"DisentangledSelfAttention.forward": forward, "DebertaEncoder.get_attention_mask": keep_mask},
    whole_tables=("rel_embeddings",),
)
