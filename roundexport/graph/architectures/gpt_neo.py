"""GPT-Neo: scores are not scaled, and every other layer sees a window, by a table of its own beside the mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.masking_utils import sliding_window_causal_mask_function

from .interface import Architecture, Trace, heads_first


def attend(
    attention: Any, trace: Trace, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, None]:
    """In place of GPTNeoSelfAttention._attn."""
    window = int(attention.config.window_size) if attention.attention_type == "local" else None
    if window is not None:
        mask = trace.make_mask(attention_mask=mask, mask_function=sliding_window_causal_mask_function(window))
    return heads_first(trace.attend(attention, query, key, value, mask, scaling=1.0, sliding_window=window)[0]), None


ARCHITECTURE = Architecture({"GPTNeoSelfAttention._attn": attend})
