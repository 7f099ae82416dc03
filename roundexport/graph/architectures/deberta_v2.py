"""DeBERTa v2 and v3: disentangled attention, whose bias depends on content and on distance.

    scores = (q·k + q·Pk(i-j) + k·Pq(i-j)) / sqrt(f·D)       f = 1 + how many of the two terms there are

Pk and Pq are projections of a table of distances, by bucket; the table is used whole, so it stays in the graph.  The
products with it are few rows wide (twice the buckets) and are gathered by distance.

Source: arXiv 2006.03654, and DisentangledSelfAttention of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function

from .interface import Architecture, Trace


def keep_mask(_: Any, trace: Trace, attention_mask: Tensor) -> Tensor | None:
    """In place of DebertaV2Encoder.get_attention_mask: what padding sees is nobody's business."""
    return trace.make_mask(attention_mask=attention_mask, mask_function=bidirectional_mask_function)


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
    query = _heads(attention, attention.query_proj(hidden_states if query_states is None else query_states))
    key, value = (_heads(attention, layer(hidden_states)) for layer in (attention.key_proj, attention.value_proj))
    kinds = [kind for kind in ("c2p", "p2c") if kind in attention.pos_att_type]
    bias = None
    if attention.relative_attention and relative_pos is not None and rel_embeddings is not None:
        span, heads = attention.pos_ebd_size, attention.num_attention_heads
        own = {"c2p": "pos_key_proj", "p2c": "pos_query_proj"}
        projections = {"c2p": "key_proj", "p2c": "query_proj"} if attention.share_att_key else own
        tables = {
            kind: getattr(attention, projections[kind])(rel_embeddings[: 2 * span]).unflatten(-1, (heads, -1))
            for kind in kinds
        }
        tables = {kind: table.transpose(0, 1) for kind, table in tables.items()}
        bias = distance_bias(query, key, relative_pos, span, tables) if tables else None
    return attend(trace, attention, (query, key, value), attention_mask, bias, len(kinds))


def attend(
    trace: Trace,
    attention: Any,
    heads: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    bias: Tensor | None,
    terms: int,
) -> tuple[Tensor, None]:
    """Attention of query, key and value, [B, H, S, D] each, with a bias of so many terms of distance: [B, S, H·D]."""
    scale = 1 / math.sqrt(attention.attention_head_size * (1 + terms))
    bias = None if bias is None else bias * scale
    out, _none = trace.attend(attention, *heads, mask, scaling=scale, position_bias=bias)
    return out.flatten(2), None


def distance_bias(query: Tensor, key: Tensor, distance: Tensor, span: int, tables: Mapping[str, Tensor]) -> Tensor:
    """The two terms of distance, as far as there are, not scaled yet: [B, H, S, S].

    Args:
        query: [B, H, S, D].
        key: [B, H, S, D].
        distance: i - j, or its bucket, [1, 1, S, S].
        span: half of the rows of a table.
        tables: kind of term -> projected table of distances, [H, 2 · span, D]; at least one.
    """
    batch, heads, length, _ = query.shape
    found = []
    for kind, table in tables.items():
        content, sign = (query, 1) if kind == "c2p" else (key, -1)
        rows = (span + sign * distance).clamp(0, 2 * span - 1).expand(batch, heads, length, length)
        term = (content @ table.transpose(-1, -2)).gather(-1, rows)
        found.append(term if kind == "c2p" else term.transpose(-1, -2))
    return found[0] if len(found) == 1 else found[0] + found[1]


def _heads(attention: Any, x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:-1], attention.num_attention_heads, -1).transpose(1, 2)


ARCHITECTURE = Architecture(
    {"DisentangledSelfAttention.forward": forward, "DebertaV2Encoder.get_attention_mask": keep_mask},
    whole_tables=("rel_embeddings",),
)
