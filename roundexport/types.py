"""Words that models, files and graphs share; they belong to none of them."""

from __future__ import annotations

from typing import Literal, TypedDict

Task = Literal["generate", "embed", "classify", "tag", "fill"]
"""What a model is for, by what comes out of it for token ids [B, S]:

    generate   logits [B, S, V] of the next token, with a KV cache        embed   hidden states [B, S, H]
    classify   logits [B, labels] of the text, or of a pair of texts      tag     logits [B, S, labels] of every token
    fill       logits [B, S, V] of the token that stands there
"""


def output_of(task: Task) -> str:
    """Name of the output of a graph for this task."""
    return "last_hidden_state" if task == "embed" else "logits"


PoolingMode = Literal["mean", "cls", "last", "max", "mean_sqrt_len", "weightedmean"]


class Pooling(TypedDict):
    """How an encoder's hidden states become one vector, and whether that is scaled to length 1."""

    mode: PoolingMode
    normalize: bool


class KvLayer(TypedDict):
    """Key and value heads of one attention layer with a cache, in order of its index."""

    layer: int
    num_kv_heads: int
    head_dim: int
