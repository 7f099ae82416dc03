"""A function of one eight-bit number as a table of its 256 values: GELU between the linears of a block.

    y[c] = TABLE[ex of c, ey of c][x[c] + 128]        TABLE[ex, ey][i] = clip(round(f((i - 128)·2**ex) / 2**ey))

Blocks with the same two exponents share a table, so a layer has a few of them.  They are made with float64 once and
stored; nothing in float is computed when the encoder runs.

`reference` is numpy, `Simulation` torch: both look up.  In: codes [..., C].  Out: codes [..., C].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import SpecError

from . import integer_linear
from ._block_format import Format, Integers

if TYPE_CHECKING:
    from torch import Tensor

available = integer_linear.available


def _gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def _gelu_tanh(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# As transformers names them in `hidden_act`.
FUNCTIONS: dict[str, Callable[[float], float]] = {
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": lambda x: max(x, 0.0),
}


@dataclass(frozen=True, eq=False)
class IntegerTable:
    """A function between two formats.

    Args:
        function: a key of `FUNCTIONS`.
        entering: format of its inputs, 8 bits.
        leaving: format of its outputs.
        name: in errors.

    Raises:
        SpecError: an unknown function, formats of different widths, inputs of more than 8 bits.
    """

    function: str
    entering: Format
    leaving: Format
    name: str = "table"

    def __post_init__(self) -> None:
        if self.function not in FUNCTIONS:
            raise SpecError(f"{self.name}: no table for {self.function!r}; there are {', '.join(sorted(FUNCTIONS))}")
        if self.entering.width != self.leaving.width or self.entering.bits != 8:
            raise SpecError(f"{self.name}: {self.entering.width} channels of {self.entering.bits} bits enter a table")

    @cached_property
    def _pairs(self) -> tuple[list[tuple[int, int]], NDArray[np.int64]]:
        both = np.stack([self.entering.channels(), self.leaving.channels()], 1)
        pairs, index = np.unique(both, axis=0, return_inverse=True)
        return [(int(a), int(b)) for a, b in pairs], index.reshape(-1)

    @cached_property
    def tables(self) -> Integers:
        """TABLE of every pair of exponents, [pairs, 256]."""
        value = FUNCTIONS[self.function]
        rows = [[value((i - 128) * 2.0**enters) / 2.0**leaves for i in range(256)] for enters, leaves in self._pairs[0]]
        return self.leaving.clip(np.floor(np.array(rows) + 0.5).astype(np.int32))

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where a channel's table begins in all of them, moved to its code 0, [C]."""
        return self._pairs[1] * 256 + 128


def reference(x: Integers, table: IntegerTable) -> Integers:
    """Codes [..., C] of codes [..., C]."""
    found: Integers = table.tables.reshape(-1)[x + table.starts]
    return found


class Simulation:
    """The same in torch, on codes that are held in float32.

    Args:
        table: to look up.
    """

    def __init__(self, table: IntegerTable) -> None:
        import torch

        self._values = torch.from_numpy(table.tables.reshape(-1)).float()
        self._starts = torch.from_numpy(table.starts.astype(np.int32))

    def __call__(self, x: Tensor) -> Tensor:
        """Codes [..., C] of codes [..., C]."""
        import torch

        return self._values[x.to(torch.int32) + self._starts]


def run(x: Tensor, table: IntegerTable) -> Tensor:
    """:func:`reference` in torch; codes float32."""
    return Simulation(table)(x)
