"""Words that models, files and graphs share; they belong to none of them."""

from __future__ import annotations

from typing import Literal, TypedDict

Task = Literal["generate", "embed"]
"""What a model is for: token ids to logits, or token ids to hidden states."""

PoolingMode = Literal["mean", "cls", "last"]


class Pooling(TypedDict):
    """How an encoder's hidden states become one vector, and whether that is scaled to length 1."""

    mode: PoolingMode
    normalize: bool


class KvLayer(TypedDict):
    """Key and value heads of one attention layer with a cache, in order of its index."""

    layer: int
    num_kv_heads: int
    head_dim: int
