"""What a target's tool for 8-bit weights and activations is given, and what it says it did (w8a8.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Feed = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class QuantizedProducts:
    """What a tool did.

    Args:
        tool: its name and version.
        layers: linears and tables whose weights are in 8 bits, of linears the inputs too.
        settings: what it was asked for.
        reverted: those that it had put in 8 bits and that are float again, as they lost too much.
        cosine: mean cosine to the float package's vectors, see w8a8_control.py.
    """

    tool: str
    layers: tuple[str, ...]
    settings: Mapping[str, str | int | float]
    reverted: tuple[str, ...]
    cosine: float


def feeds_of(ids: NDArray[np.int64], inputs: Sequence[str]) -> list[Feed]:
    """A graph's inputs for samples without padding, one sample each."""
    return [{name: _input(name, row[None]) for name in inputs} for row in ids]


def _input(name: str, row: NDArray[np.int64]) -> NDArray[np.int64]:
    if name == "input_ids":
        return row
    if name == "position_ids":
        return np.arange(row.shape[1], dtype=np.int64)[None]
    return np.full_like(row, {"attention_mask": 1, "token_type_ids": 0}[name])
