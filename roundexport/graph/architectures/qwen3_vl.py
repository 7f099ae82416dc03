"""Qwen3-VL: what is written by place in tensors, without that.

DeepStack    features are added at the places of pictures; here they come with a row for every token, zeros for text
M-RoPE       angle i is of time where i mod 3 = 0 or i ≥ 3 · (pairs of that axis), else of the axis i mod 3
positions    the tower's square table is resampled as a matrix, see model/grid_tower.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .interface import Architecture, Trace


def deepstack(_model: Any, _trace: Trace, hidden_states: Tensor, _masks: Any, visual_embeds: Tensor) -> Tensor:
    """In place of Qwen3VLTextModel._deepstack_process."""
    return hidden_states + visual_embeds


def angles(rotary: Any, _trace: Trace, freq: Tensor) -> Tensor:
    """In place of Qwen3VLTextRotaryEmbedding.recomposition_frequencies."""
    places, found = torch.arange(freq.shape[-1]), freq[0]
    for axis in (1, 2):
        own = (places % 3 == axis) & (places < 3 * rotary.mrope_section[axis])
        found = torch.where(own, freq[axis], found)
    return torch.cat((found, found), -1)


ARCHITECTURE = Architecture(
    {
        "Qwen3VLTextModel._deepstack_process": deepstack,
        "Qwen3VLTextRotaryEmbedding.recomposition_frequencies": angles,
    },
    whole_tables=("pos_embed",),
    asks=True,
)
