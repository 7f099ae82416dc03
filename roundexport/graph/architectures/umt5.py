"""UMT5: T5's attention, with a bias of every layer's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import t5
from .interface import Architecture, Trace


def forward(
    attention: Any,
    trace: Trace,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """In place of UMT5Attention.forward."""
    out, _bias, _none = t5.forward(
        attention, trace, hidden_states, attention_mask, encoder_hidden_states, past_key_values=past_key_values
    )
    return out, None


ARCHITECTURE = Architecture({"UMT5Attention.forward": forward}, asks=True)
