"""The format of an integer tensor whose blocks have their own power-of-two step, and the shift that leads to it.

    value[c] = code[c] · 2**exponent[c // block]        block neighbors along the last axis; code int8 or int16

A result is brought to the next tensor's format by one shift with rounding, half up, and is then clipped:

    shift(a, n) = floor(a / 2**n + 1/2) = ((a >> (n - 1)) + 1) >> 1        n > 0; the second form needs no 33rd bit
    shift(a, n) = a << -n                                                  n <= 0; saturates at 2**30

Limits: a is int32; every sum in the integer encoder is proven to stay within 2**30 when it is built, so that adding
two of them stays within int32 as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor

Integers = NDArray[np.int32]

LIMIT = 1 << 30  # of every sum
LEAST, MOST = -64, 63  # exponents; one byte holds them


@dataclass(frozen=True, eq=False)
class Format:
    """How an integer tensor's codes are to be read.

    Args:
        width: channels, the tensor's last axis.
        exponents: int8 [B]; B divides the width.
        bits: of a code, 8 or 16.

    Raises:
        SpecError: blocks that do not divide the width, exponents that a byte does not hold, other bits.
    """

    width: int
    exponents: NDArray[np.int8]
    bits: int = 8

    def __post_init__(self) -> None:
        if self.bits not in (8, 16):
            raise SpecError(f"codes of an integer tensor have 8 or 16 bits, not {self.bits}")
        blocks = self.exponents.size
        if self.exponents.dtype != np.int8 or self.exponents.shape != (blocks,):
            raise SpecError(f"exponents must be int8 [blocks], found {self.exponents.dtype} {self.exponents.shape}")
        if not blocks or self.width % blocks:
            raise SpecError(f"{blocks} blocks do not divide {self.width} channels")
        if self.exponents.min() < LEAST or self.exponents.max() > MOST:
            raise SpecError(f"exponents must be from {LEAST} to {MOST}, found {self.exponents.tolist()}")

    @property
    def block(self) -> int:
        """Channels that share an exponent."""
        return self.width // self.exponents.size

    @property
    def least(self) -> int:
        """The least code; the largest is one less than its magnitude."""
        return -(1 << (self.bits - 1))

    def channels(self) -> Integers:
        """The exponent of every channel, int32 [width]."""
        return np.repeat(self.exponents.astype(np.int32), self.block)

    def clip(self, codes: Integers) -> Integers:
        """Codes held to what the format has."""
        return np.clip(codes, self.least, -self.least - 1)

    def values(self, codes: NDArray[np.integer]) -> NDArray[np.float64]:
        """What codes [..., width] mean."""
        return np.ldexp(codes.astype(np.float64), self.channels())

    def codes(self, values: NDArray[np.floating]) -> Integers:
        """The nearest codes of values [..., width], half up as everywhere."""
        return self.clip(np.floor(np.ldexp(values.astype(np.float64), -self.channels()) + 0.5).astype(np.int32))


def shift(numbers: Integers, by: Integers | int) -> Integers:
    """``numbers / 2**by``, rounded half up; to the left where ``by`` is negative.

    Args:
        numbers: int32, any shape.
        by: int32 that broadcasts with it.

    Returns:
        int32.
    """
    by = np.asarray(by, np.int32)
    right = (np.right_shift(numbers, np.clip(by - 1, 0, 31)) + 1) >> 1
    up = np.clip(-by, 0, 30)
    left = np.left_shift(np.clip(numbers, -(LIMIT >> up), LIMIT >> up), up)
    return np.asarray(np.where(by > 0, right, np.where(by == 0, numbers, left)), np.int32)


def rounded_tensor(values: Tensor, tensor: Format) -> Tensor:
    """Float values [..., width] after a format, float32: what :meth:`Format.codes` and ``values`` make of them."""
    import torch

    steps = torch.from_numpy(np.ldexp(np.float32(1), tensor.channels()))
    return (values / steps).add_(0.5).floor_().clamp_(tensor.least, -tensor.least - 1) * steps


def within(bound: int, what: str) -> None:
    """Refuse a sum that could leave its limit.

    Raises:
        SpecError: it could.
    """
    if bound > LIMIT:
        raise SpecError(f"{what} can reach {bound}, more than 2**30: its blocks' exponents lie too far apart")


def shift_tensor(numbers: Tensor, by: Tensor | int) -> Tensor:
    """:func:`shift` of a torch tensor of integers, by floor division of integers in their own dtype."""
    import torch

    by = torch.as_tensor(by, dtype=numbers.dtype)
    right = torch.bitwise_right_shift(numbers, (by - 1).clamp(0, 31)).add_(1).bitwise_right_shift_(1)
    if bool((by > 0).all()):
        return right
    up = (-by).clamp(0, 30)
    most = torch.bitwise_right_shift(torch.full_like(up, LIMIT), up)
    left = torch.bitwise_left_shift(torch.minimum(torch.maximum(numbers, -most), most), up)
    return torch.where(by > 0, right, torch.where(by == 0, numbers, left))


def bit_length(numbers: Integers) -> Integers:
    """Bits of non-negative int32 numbers; 0 has none."""
    return np.frexp(numbers.astype(np.float64))[1].astype(np.int32)
