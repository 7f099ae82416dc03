"""A linear in integers: eight-bit inputs, four- or eight-bit weights, a power of two for every block of either.

    x[t, k] = qx[t, k] · 2**ex[k]        w[n, k] = qw[n, k] · 2**ew[n, group of k]        blocks of k on both sides

A block's products are summed as they are.  Sums of different blocks have different exponents, so each is shifted to
the row's finest, to the left, which loses nothing:

    e[n] = min over k of ex[k] + ew[n, k]
    acc[t, n] = bias[n] + Σ_blocks (Σ_{k in block} qx · qw) << (ex + ew - e[n])
    y[t, n] = clip(shift(acc, ey[n] - e[n]))                              one rounding in all; _block_format.py

The bias has eight bits and one exponent; it is shifted to e[n] when the linear is built.

Bound, proven then for every row:  |acc| <= Σ_k 128·|qw|·2**(ex + ew - e) + |bias| <= 2**30.  A row of 1536 four-bit
codes leaves room for exponents that differ by 9.

`reference` is numpy in int32.  `Simulation` (and `run`, which makes one) is torch: codes are held in floats and the
product is a float product, of weights that are shifted beforehand.  It is exact: all summands are multiples of
one unit, and the bound says that no sum of any of them, in any order, has more than the 24 bits of a float32; a row
whose bound is 2**23 or more is computed in float64.

In: codes [..., K].  Out: codes [..., N].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import SpecError
from roundexport.quant.int8_tensor import Int8Tensor
from roundexport.quant.quantized_linear import QuantizedLinear

from ._block_format import Format, Integers, shift, within

if TYPE_CHECKING:
    from torch import Tensor

FLOAT32_EXACT = 1 << 23  # sums below it, and half of one more, are exact in float32


def available() -> str | None:
    """None when torch is there, which `Simulation` needs; else the reason."""
    from importlib.util import find_spec

    return None if find_spec("torch") else "torch is not installed; pip install 'roundexport[tune]'"


def exponents_of(scales: NDArray[np.floating]) -> tuple[Integers, Integers]:
    """Signs and exponents of scales that are powers of two."""
    mantissa, exponent = np.frexp(scales.astype(np.float64))
    if not (np.abs(mantissa) == 0.5).all():
        raise SpecError("the scales of an integer linear must be powers of two (scale_dtype exponent8)")
    return np.sign(mantissa).astype(np.int32), exponent.astype(np.int32) - 1


@dataclass(frozen=True, eq=False)
class IntegerLinear:
    """A linear whose formats are settled.

    Args:
        weight: symmetric, its scales powers of two, [N, K].
        bias: [N].
        entering: format of the inputs, K channels of 8 bits.
        leaving: format of the outputs, N channels.
        name: in errors.

    Raises:
        SpecError: widths that do not meet, scales that are no powers of two, sums that int32 might not hold.
    """

    weight: QuantizedLinear
    bias: Int8Tensor
    entering: Format
    leaving: Format
    name: str = "linear"

    def __post_init__(self) -> None:
        met = (self.weight.in_features, self.weight.out_features, self.bias.codes.shape)
        if met != (self.entering.width, self.leaving.width, (self.leaving.width,)):
            raise SpecError(
                f"{self.name}: weight and bias are {met}, formats {self.entering.width, self.leaving.width}"
            )
        if self.entering.bits != 8:
            raise SpecError(f"{self.name}: a product takes codes of 8 bits, not {self.entering.bits}")
        within(int(self.bound.max()), f"{self.name}: a sum of products")

    @cached_property
    def codes(self) -> Integers:
        """Weights as signed integers [N, K], the sign of a scale among them."""
        sign, _ = exponents_of(self.weight.scales)
        centered = self.weight.unpack().astype(np.int32) - self.weight.spec.midpoint
        if self.weight.zero_points is not None:
            raise SpecError(f"{self.name}: weights of an integer linear are symmetric")
        return centered * np.repeat(sign, self.group, 1)

    @property
    def group(self) -> int:
        """Weights of a row that share an exponent."""
        return self.weight.in_features // self.weight.groups

    @cached_property
    def block(self) -> int:
        """Neighbors of K whose inputs and weights have one exponent each."""
        return math.gcd(self.group, self.entering.block)

    @cached_property
    def _sums(self) -> Integers:
        """Exponent of every block's sum, [N, K/block]."""
        _, weights = exponents_of(self.weight.scales)
        blocks = np.repeat(weights, self.group // self.block, 1)
        return blocks + np.repeat(self.entering.exponents.astype(np.int32), self.entering.block // self.block)

    @cached_property
    def exponents(self) -> Integers:
        """e, the exponent of each row's accumulator [N]."""
        finest: Integers = self._sums.min(1)
        return finest

    @cached_property
    def shifts(self) -> Integers:
        """How far to the left each block's sum goes, [N, K/block]."""
        return self._sums - self.exponents[:, None]

    @cached_property
    def aligned_bias(self) -> Integers:
        """The bias in each row's accumulator, [N]."""
        exponent = int(np.frexp(np.float64(abs(self.bias.scale)))[1]) - 1
        codes = self.bias.codes.astype(np.int32) * (1 if self.bias.scale > 0 else -1)
        longest = int((exponent - self.exponents)[codes != 0].max(initial=0))
        within(128 << max(longest, 0), f"{self.name}: the bias")
        by = self.exponents - exponent
        return np.where(by < 0, codes << np.clip(-by, 0, 23), shift(codes, np.maximum(by, 0)))

    @cached_property
    def bound(self) -> NDArray[np.int64]:
        """What no partial sum of a row exceeds, [N]."""
        if (self.shifts > 31).any():
            raise SpecError(f"{self.name}: exponents of its blocks differ by {int(self.shifts.max())}")
        sums = np.abs(self.codes).reshape(len(self.codes), -1, self.block).sum(2, dtype=np.int64)
        products: NDArray[np.int64] = (128 * sums << self.shifts.astype(np.int64)).sum(1)
        return products + np.abs(self.aligned_bias)


def accumulate(x: Integers, linear: IntegerLinear) -> Integers:
    """acc, int32 [..., N], from codes [..., K]."""
    acc = np.broadcast_to(linear.aligned_bias, (*x.shape[:-1], len(linear.codes))).astype(np.int32)
    for index in range(linear.shifts.shape[1]):
        part = slice(index * linear.block, (index + 1) * linear.block)
        acc += (x[..., part] @ linear.codes[:, part].T) << linear.shifts[:, index]
    return acc


def reference(x: Integers, linear: IntegerLinear) -> Integers:
    """Codes [..., N] of codes [..., K], int32 throughout."""
    target = linear.leaving
    return target.clip(shift(accumulate(x, linear), target.channels() - linear.exponents))


class Simulation:
    """The same in torch, on codes that are held in float32.

    Args:
        linear: to compute.
    """

    def __init__(self, linear: IntegerLinear) -> None:
        import torch

        exact = int(linear.bound.max()) < FLOAT32_EXACT
        self._dtype = torch.float32 if exact else torch.float64
        weight = np.ldexp(linear.codes.astype(np.float64), np.repeat(linear.shifts, linear.block, 1))
        self._weight = torch.from_numpy(weight).to(self._dtype)
        self._bias = torch.from_numpy(linear.aligned_bias).to(self._dtype)
        self._factor = powers(linear.exponents - linear.leaving.channels()).to(self._dtype)
        self._least = linear.leaving.least

    def __call__(self, x: Tensor) -> Tensor:
        """Codes [..., N] of codes [..., K]."""
        import torch

        acc = torch.nn.functional.linear(x.to(self._dtype), self._weight, self._bias)
        return acc.mul_(self._factor).add_(0.5).floor_().clamp_(self._least, -self._least - 1).float()


def powers(exponents: Integers) -> Tensor:
    """2**exponents, float64."""
    import torch

    return torch.from_numpy(np.ldexp(1.0, exponents))


def run(x: Tensor, linear: IntegerLinear) -> Tensor:
    """:func:`reference` in torch; codes float32."""
    return Simulation(linear)(x)
