"""DeBERTa v2 and v3: disentangled attention, whose bias depends on content and on distance.

    scores = (q·k + q·Pk(i-j) + k·Pq(i-j)) / sqrt(f·D)       f = 1 + how many of the two terms there are

Pk and Pq are projections of a table of distances, by bucket; the table is used whole, so it stays in the graph.  The
products with it are few rows wide (twice the buckets) and are gathered by distance.

Source: arXiv 2006.03654, and DisentangledSelfAttention of transformers.
"""

from __future__ import annotations

import math
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
    scale = 1 / math.sqrt(attention.attention_head_size * (1 + len(kinds)))
    bias = None
    if attention.relative_attention and relative_pos is not None and rel_embeddings is not None:
        span = attention.pos_ebd_size
        table = rel_embeddings[: 2 * span]
        shared = attention.share_att_key
        batch, heads, length, _ = query.shape
        where = (relative_pos + span).clamp(0, 2 * span - 1).expand(batch, heads, length, length)
        for kind in kinds:
            if kind == "c2p":
                project, content, index = attention.key_proj if shared else attention.pos_key_proj, query, where
            else:
                project, content = attention.query_proj if shared else attention.pos_query_proj, key
                index = (span - relative_pos).clamp(0, 2 * span - 1).expand(batch, heads, length, length)
            positions = project(table).unflatten(-1, (heads, -1)).transpose(0, 1)
            found = (content @ positions.transpose(-1, -2)).gather(-1, index) * scale
            found = found if kind == "c2p" else found.transpose(-1, -2)
            bias = found if bias is None else bias + found
    out, _none = trace.attend(attention, query, key, value, attention_mask, scaling=scale, position_bias=bias)
    return out.flatten(2), None


def _heads(attention: Any, x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:-1], attention.num_attention_heads, -1).transpose(1, 2)


ARCHITECTURE = Architecture(
    {"DisentangledSelfAttention.forward": forward, "DebertaV2Encoder.get_attention_mask": keep_mask},
    whole_tables=("rel_embeddings",),
)
