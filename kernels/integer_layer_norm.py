"""LayerNorm in integers: of a sum of integer tensors, with a 256-entry table for the reciprocal square root.

What is normalized is a sum (a layer's output and the tensor that goes past it; or the embeddings of a token).  Its
summands have an exponent per channel, and are brought to one exponent es, the least of them where the sums below allow:

    s[c] = Σ_summands shift(code[c], es - exponent[c])

The mean needs no division, as a norm does not see a factor; every token then gets a shift of its own:

    d[c] = C·s[c] - Σ_c s                                     the value times C, centered exactly; |d| <= 2**30
    d'   = shift(d, k), at most 2**m - 1                      k: the least that leaves m bits; m: C·2**(2m) <= 2**31
    S    = Σ_c d'²
    u    = S >> 2j                                            j: u has 7 or 8 bits, 64 … 255; S << -2j for small S
    z[c] = shift(d' · RSQRT[u], j + 3)                        z · 2**(h - 15) is the normalized value
    y[c] = clip(shift(z·γ[c] + β[c], ey[c] - (h - 15 + eγ)))  γ, β: eight bits; β is shifted to the product's exponent

    RSQRT[u] = round(2**(15 - h)·√C / √((u + 1/2)/64))        h: the least integer with 2**h >= √C, so RSQRT < 2**15

d'/√S = d'·2**-j·8/√(u/64)/64, whence j + 3.  The table is off by 1/256 at most, which is a factor of a whole token.

Bounds: |d'·RSQRT| < 2**26; |z| <= 2**15·(1 + 1/128), as no channel exceeds the norm; |z·γ| < 2**22.1, and β is held to
2**29.  Limits: epsilon is left out; S is at least 1.  A token whose channels are all alike gives β.

`reference` is numpy in int32, `Simulation` torch in int32.  In: summands [..., C] with their exponents.  Out: codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from roundexport.errors import SpecError
from roundexport.quant.int8_tensor import Int8Tensor

from . import integer_linear
from ._block_format import LIMIT, Format, Integers, bit_length, shift, shift_tensor, within

if TYPE_CHECKING:
    from torch import Tensor

available = integer_linear.available


@dataclass(frozen=True, eq=False)
class Summand:
    """One tensor of the sum: its least and greatest exponent, and a code's largest magnitude."""

    least: int
    most: int
    largest: int

    @classmethod
    def of(cls, tensor: Format) -> Summand:
        """A tensor of this format."""
        return cls(int(tensor.exponents.min()), int(tensor.exponents.max()), -tensor.least)


@dataclass(frozen=True, eq=False)
class IntegerLayerNorm:
    """A norm whose formats are settled.

    Args:
        summands: what is added up.
        weight: γ, [C].
        bias: β, [C].
        leaving: format of the outputs.
        name: in errors.

    Raises:
        SpecError: widths that do not meet, sums or a bias that int32 might not hold.
    """

    summands: tuple[Summand, ...]
    weight: Int8Tensor
    bias: Int8Tensor
    leaving: Format
    name: str = "norm"

    def __post_init__(self) -> None:
        width = (self.leaving.width,)
        if {width} != {self.weight.codes.shape, self.bias.codes.shape}:
            raise SpecError(f"{self.name}: weight and bias do not both have {width[0]} channels")
        reach = int(np.abs(self.beta.astype(np.int64)).max())
        within(reach + (1 << 23), f"{self.name}: the bias")

    @property
    def width(self) -> int:
        """C."""
        return self.leaving.width

    @cached_property
    def exponent(self) -> int:
        """es: the least exponent at which 2·C times the largest sum stays within 2**30."""
        exponent = min(s.least for s in self.summands)
        while 2 * self.width * self._largest(exponent) > LIMIT:
            exponent += 1
        return exponent

    def _largest(self, exponent: int) -> int:
        return sum(math.ceil(s.largest * 2.0 ** (s.most - exponent)) + 1 for s in self.summands)

    @cached_property
    def bits(self) -> int:
        """M: of a centered value."""
        return (31 - math.ceil(math.log2(self.width))) // 2

    @cached_property
    def _height(self) -> int:
        return math.ceil(math.log2(math.sqrt(self.width)))

    @cached_property
    def table(self) -> Integers:
        """RSQRT; its first 64 of 256 entries are never read."""
        u = np.maximum(np.arange(256), 64) + 0.5
        return np.floor(2.0 ** (15 - self._height) * math.sqrt(self.width) / np.sqrt(u / 64) + 0.5).astype(np.int32)

    @cached_property
    def gamma(self) -> Integers:
        """γ's codes, [C]."""
        return self.weight.codes.astype(np.int32) * (1 if self.weight.scale > 0 else -1)

    @cached_property
    def product_exponent(self) -> int:
        """Exponent of z·γ."""
        return self._height - 15 + _exponent(self.weight)

    @cached_property
    def beta(self) -> Integers:
        """β in the product's exponent, [C]."""
        values = np.ldexp(self.bias.values().astype(np.float64), -self.product_exponent)
        if np.abs(values).max(initial=0) >= LIMIT:
            raise SpecError(f"{self.name}: the bias is 2**30 and more times finer than the weight")
        return np.floor(values + 0.5).astype(np.int32)


def _exponent(tensor: Int8Tensor) -> int:
    return int(np.frexp(np.float64(abs(tensor.scale)))[1]) - 1


def reference(summands: Sequence[tuple[Integers, Integers]], norm: IntegerLayerNorm) -> Integers:
    """Codes of a normalized sum, int32 throughout.

    Args:
        summands: codes [..., C] and their exponents, which broadcast with them.
        norm: the norm.
    """
    parts = [shift(codes, np.int32(norm.exponent) - exponents) for codes, exponents in summands]
    total = np.sum(parts, 0, dtype=np.int32)
    centered = np.int32(norm.width) * total - total.sum(-1, keepdims=True, dtype=np.int32)
    most = np.abs(centered).max(-1, keepdims=True)
    limit = (1 << norm.bits) - 1
    short = np.clip(shift(centered, np.maximum(bit_length(most) - norm.bits, 0)), -limit, limit)
    energy = np.maximum(np.square(short).sum(-1, keepdims=True, dtype=np.int32), 1)
    half = (bit_length(energy) - 7) // 2
    index = np.where(half >= 0, energy >> np.maximum(2 * half, 0), energy << np.maximum(-2 * half, 0))
    normal = shift(short * norm.table[index], half + 3)
    return norm.leaving.clip(
        shift(normal * norm.gamma + norm.beta, norm.leaving.channels() - np.int32(norm.product_exponent))
    )


class Simulation:
    """The same in torch.

    Args:
        norm: to compute.
    """

    def __init__(self, norm: IntegerLayerNorm) -> None:
        import torch

        self._is = norm
        self._table, self._gamma, self._beta = (torch.from_numpy(a) for a in (norm.table, norm.gamma, norm.beta))
        self._last = torch.from_numpy(norm.leaving.channels() - np.int32(norm.product_exponent))

    def __call__(self, summands: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Codes [..., C], float32, of codes (any dtype) and their exponents (int32, broadcasting)."""
        import torch

        norm = self._is
        total = sum(shift_tensor(codes.to(torch.int32), norm.exponent - exponents) for codes, exponents in summands)
        assert isinstance(total, torch.Tensor)
        centered = norm.width * total - total.sum(-1, keepdim=True, dtype=torch.int32)
        most = centered.abs().amax(-1, keepdim=True)
        limit = (1 << norm.bits) - 1
        drop = (torch.frexp(most.double())[1] - norm.bits).clamp_(min=0)
        short = shift_tensor(centered, drop).clamp_(-limit, limit)
        energy = short.square().sum(-1, keepdim=True, dtype=torch.int32).clamp_(min=1)
        half = torch.div(torch.frexp(energy.double())[1] - 7, 2, rounding_mode="floor")
        index = torch.where(half >= 0, energy >> (2 * half).clamp(min=0), energy << (-2 * half).clamp(min=0))
        normal = shift_tensor(short * self._table[index], half + 3)
        codes = shift_tensor(normal * self._gamma + self._beta, self._last)
        least = norm.leaving.least
        return codes.clamp_(least, -least - 1).float()


def run(summands: Sequence[tuple[Tensor, Tensor]], norm: IntegerLayerNorm) -> Tensor:
    """:func:`reference` in torch; codes float32."""
    return Simulation(norm)(summands)
