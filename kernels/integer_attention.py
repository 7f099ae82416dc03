"""Attention in integers: eight-bit queries, keys and values, a table for exp, one for the reciprocal of its sum.

Per head, with D channels and codes q, k, v whose blocks have exponents eq, ek, ev:

    s[t, u] = Σ_d (q[t, d] << (eq[d] + ek[d] - es)) · k[u, d]                es: the least eq + ek of the head
    i[t, u] = min(255, shift(max_u s[t, u] - s[t, u], step - es))            unmasked keys u only
    e[t, u] = EXP[i]                                                         EXP[i] = round(255·exp(-i·2**step/√D))
    Σ[t]    = Σ_u e[t, u]                                                    masked keys: 0
    a[t, d] = Σ_u e[t, u] · v[u, d]                                          |a| <= 128·Σ
    c[t, d] = clip(shift((a >> n) · RECIPROCAL[Σ >> n], ec[d] - ev[d] + 22)) n: Σ >> n has 8 bits; a >> n is rounded

Scores are never rounded before the largest is subtracted, so the table's 256 steps span what matters: from 1 down to
1/510, where eight bits round to 0.  `step` is the least exponent whose 255 steps reach that far; 1/√D is in the table.
Probabilities are never divided: the largest of a row is 255 however many keys there are, and the sum divides the row's
result, by RECIPROCAL[σ] = round(2**22 / (σ + 1/2)), σ = 128 … 255, which is off by 1/256 at most.

Bounds: |s| <= D·2**14·2**spread <= 2**29 when built, so that a difference of two stays within 2**30;
|a| <= 128·255·U <= 2**30 for up to 32896 keys; |a >> n| <= 2**15 and RECIPROCAL < 2**15.

`reference` is numpy in int32; `Simulation` is torch: products in float32 where D·2**14·2**spread and 128·255·U are
below 2**24, so that no sum is rounded, else float64; the rest in int32.

In: codes q, k, v [B, T, C], mask [B, T].  Out: codes [B, T, C].  Limits: every row of the mask has a 1; no causal mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import SpecError

from . import integer_linear
from ._block_format import Format, Integers, bit_length, shift, shift_tensor, within

if TYPE_CHECKING:
    from torch import Tensor

available = integer_linear.available

_EXACT = 1 << 24  # integers up to it are float32 numbers
_RECIPROCAL_BITS = 22
_SMALLEST = math.log(2 * 255)  # exp(-_SMALLEST) of 255 is one half
MOST_KEYS = (1 << 30) // (128 * 255)


@dataclass(frozen=True, eq=False)
class IntegerAttention:
    """The formats between projections.

    Args:
        heads: their number; they share the channels alike.
        queries: format of q.
        keys: format of k.
        values: format of v.
        leaving: format of the result.
        name: in errors.

    Raises:
        SpecError: heads that do not divide the width, other widths or bits, scores that may leave int32.
    """

    heads: int
    queries: Format
    keys: Format
    values: Format
    leaving: Format
    name: str = "attention"

    def __post_init__(self) -> None:
        formats = (self.queries, self.keys, self.values, self.leaving)
        if len({f.width for f in formats}) != 1 or self.queries.width % self.heads:
            raise SpecError(f"{self.name}: {self.heads} heads and widths {[f.width for f in formats]} do not fit")
        if any(f.bits != 8 for f in formats[:3]):
            raise SpecError(f"{self.name}: queries, keys and values have codes of 8 bits")
        within(2 * self.score_bound, f"{self.name}: a difference of scores")

    @property
    def size(self) -> int:
        """D, channels of a head."""
        return self.queries.width // self.heads

    @cached_property
    def _both(self) -> Integers:
        return (self.queries.channels() + self.keys.channels()).reshape(self.heads, self.size)

    @cached_property
    def score_exponents(self) -> Integers:
        """es, [heads]."""
        finest: Integers = self._both.min(1)
        return finest

    @cached_property
    def query_shifts(self) -> Integers:
        """How far to the left each query channel goes, [C]."""
        return (self._both - self.score_exponents[:, None]).reshape(-1)

    @cached_property
    def score_bound(self) -> int:
        """What no sum of a score exceeds."""
        return int((1 << np.minimum(self.query_shifts, 40).astype(np.int64)).reshape(self.heads, -1).sum(1).max()) << 14

    @cached_property
    def step(self) -> int:
        """Exponent of a step of EXP, before 1/√D."""
        return math.ceil(math.log2(_SMALLEST * math.sqrt(self.size) / 255))

    @cached_property
    def exp_table(self) -> NDArray[np.uint8]:
        """EXP."""
        powers = np.exp(-np.arange(256) * 2.0**self.step / math.sqrt(self.size))
        table: NDArray[np.uint8] = np.floor(255 * powers + 0.5).astype(np.uint8)
        return table


def reciprocal_table() -> Integers:
    """RECIPROCAL; the first half of its 256 entries is never read."""
    return np.floor((1 << _RECIPROCAL_BITS) / (np.maximum(np.arange(256), 128) + 0.5) + 0.5).astype(np.int32)


def reference(
    q: Integers, k: Integers, v: Integers, mask: NDArray[np.integer], attention: IntegerAttention
) -> Integers:
    """Codes of the result [B, T, C], int32 throughout."""

    def of_heads(codes: Integers) -> Integers:
        return codes.reshape(*codes.shape[:2], attention.heads, attention.size).transpose(0, 2, 1, 3)

    if q.shape[1] > MOST_KEYS:
        raise SpecError(f"{attention.name}: {q.shape[1]} tokens; sums of at most {MOST_KEYS} stay within int32")
    seen = mask.astype(bool)[:, None, None, :]
    scores = of_heads(q << attention.query_shifts) @ of_heads(k).transpose(0, 1, 3, 2)
    largest = np.where(seen, scores, -(1 << 30)).max(-1, keepdims=True)
    below = np.where(seen, largest - scores, 0)
    steps = shift(below, (attention.step - attention.score_exponents)[:, None, None])
    weights = np.where(seen, attention.exp_table[np.minimum(steps, 255)], 0).astype(np.int32)
    total = weights.sum(-1, keepdims=True, dtype=np.int32)
    mixed = weights @ of_heads(v)
    drop = bit_length(total) - 8
    divided = shift(mixed, drop) * reciprocal_table()[total >> drop]
    joined = divided.transpose(0, 2, 1, 3).reshape(q.shape)
    return attention.leaving.clip(shift(joined, _last_shift(attention)))


def _last_shift(attention: IntegerAttention) -> Integers:
    return attention.leaving.channels() - attention.values.channels() + _RECIPROCAL_BITS


class Simulation:
    """The same in torch, on codes that are held in float32.

    Args:
        attention: to compute.
    """

    def __init__(self, attention: IntegerAttention) -> None:
        import torch

        self._is = attention
        self._queries = torch.from_numpy(np.ldexp(np.float32(1), attention.query_shifts))
        self._steps = torch.from_numpy(attention.step - attention.score_exponents)[:, None, None]
        self._exp = torch.from_numpy(attention.exp_table).float()
        self._reciprocal = torch.from_numpy(reciprocal_table())
        self._last = torch.from_numpy(_last_shift(attention))
        self._scores_dtype = torch.float32 if attention.score_bound <= _EXACT else torch.float64

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Codes [B, T, C] of codes and a mask [B, T]."""
        import torch

        batch, tokens, width = q.shape
        if tokens > MOST_KEYS:
            raise SpecError(f"{self._is.name}: {tokens} tokens; sums of at most {MOST_KEYS} stay within int32")
        least = self._is.leaving.least

        def of_heads(codes: Tensor, dtype: torch.dtype) -> Tensor:
            return codes.view(batch, tokens, self._is.heads, -1).transpose(1, 2).to(dtype)

        hidden = ~mask.bool()[:, None, None, :]
        scores = of_heads(q * self._queries, self._scores_dtype) @ of_heads(k, self._scores_dtype).mT
        scores = scores.to(torch.int32).masked_fill_(hidden, -(1 << 30))
        below = scores.amax(-1, keepdim=True) - scores
        steps = shift_tensor(below.masked_fill_(hidden, 0), self._steps).clamp_(max=255)
        weights = self._exp[steps].masked_fill_(hidden, 0.0)
        total = weights.sum(-1, keepdim=True, dtype=torch.float64).to(torch.int32)
        dtype = torch.float32 if 128 * 255 * tokens <= _EXACT else torch.float64
        mixed = (weights.to(dtype) @ of_heads(v, dtype)).to(torch.int32)
        drop = torch.frexp(total.double())[1] - 8
        divided = shift_tensor(mixed, drop) * self._reciprocal[total >> drop]
        joined = divided.transpose(1, 2).reshape(batch, tokens, width)
        return shift_tensor(joined, self._last).clamp_(least, -least - 1).float()


def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, attention: IntegerAttention) -> Tensor:
    """:func:`reference` in torch; codes float32."""
    return Simulation(attention)(q, k, v, mask)
