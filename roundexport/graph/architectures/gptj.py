"""GPT-J: its `_attn` gets rotated queries and keys, heads first, and scales scores as everybody does."""

from __future__ import annotations

from torch import Tensor, nn

from .interface import Architecture, Trace, heads_first


def attend(
    attention: nn.Module, trace: Trace, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, None]:
    """In place of GPTJAttention._attn."""
    return heads_first(trace.attend(attention, query, key, value, mask)[0]), None


ARCHITECTURE = Architecture({"GPTJAttention._attn": attend}, given_up=True)
