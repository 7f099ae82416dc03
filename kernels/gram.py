"""Gram sums: the second moments of a linear's inputs, in one pass over the calibration tokens.

Tuning in Gram space needs nothing else of the tokens.  With x̂ the input of a linear in the quantized model, x its input
in the float model, both [K] per token, and w ≥ 0 the token's weight:

    H = Σ w·x̂ᵀx̂        C = Σ w·x̂ᵀ(x - x̂)        [K, K] each

H is symmetric, so only the blocks on and above its diagonal are computed and kept, strip by strip of rows, and mirrored
at the end.  Sums are float32,
taken chunk by chunk; against float64 the error stays near 1e-6 of the diagonal (tests/kernels/test_gram_kernels.py),
thousands of times below the damping.  Cost: 3.2·K² floating-point operations per token, where full H and C take 4·K².
On processors with VNNI, wide inputs use eight-bit products (gram_int8.py); sums of narrow inputs are a small part of a
block's time.

Layout: inputs [..., K], any leading shape.  Limits: sums are held in memory, 6.5·K² bytes, and H and C 8·K².
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from . import gram_int8

if TYPE_CHECKING:
    from torch import Tensor

_PARTS = 4  # strips of H: more save more of its lower half, but make the products smaller
_NARROW = 512  # K below which strips are too narrow to pay
_WIDE = 1024  # K from which eight-bit products are worth rounding for


def available() -> str | None:
    """None when torch is there, which `Sums` needs; else the reason."""
    from importlib.util import find_spec

    return None if find_spec("torch") else "torch is not installed; pip install 'roundexport[tune]'"


def reference(
    quantized: NDArray[np.floating], floats: NDArray[np.floating], weights: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """H and C in float64, from x̂ and x [T, K] and weights [T]."""
    x, target = quantized.astype(np.float64), floats.astype(np.float64)
    weighted = x * weights.astype(np.float64)[:, None]
    return weighted.T @ x, weighted.T @ (target - x)


def run(quantized: Tensor, floats: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """H and C of tokens that are all at hand; see :meth:`Sums.add`."""
    sums = Sums(quantized)
    sums.add(quantized, floats, weights)
    return sums.totals()


class Sums:
    """H and C so far.

    Args:
        like: a tensor [..., K] on the device where the sums are to be.
        eight_bit: from eight-bit products; None: where that pays.
    """

    def __init__(self, like: Tensor, eight_bit: bool | None = None) -> None:
        width = like.shape[-1]
        pays = width >= _WIDE and like.device.type == "cpu" and gram_int8.available() is None
        self._eight_bit = pays if eight_bit is None else eight_bit
        self._strips = _strips(width)
        self._packed = like.new_zeros(width, -(-_size(self._strips, width) // width))
        self._gram = list(_unpacked(self._packed))
        self._cross = like.new_zeros(width, width)

    def add(self, quantized: Tensor, floats: Tensor, weights: Tensor) -> None:
        """Add some tokens.

        Args:
            quantized: x̂, float32 [..., K].
            floats: x, likewise.
            weights: w, [...].
        """
        tokens = [t.reshape(-1, quantized.shape[-1]) for t in (quantized, floats)]
        if self._eight_bit:
            most = gram_int8.MOST_TOKENS
            for start in range(0, len(tokens[0]), most):
                part = (t[start : start + most] for t in (*tokens, weights.reshape(-1)))
                gram_int8.add(self._gram, self._cross, self._strips, *part)
            return
        root = weights.reshape(-1, 1).sqrt()
        x = tokens[0] * root
        self._cross.addmm_(x.t(), (tokens[1] * root).sub_(x))
        for strip, upper in zip(self._strips, self._gram, strict=True):
            upper.addmm_(x[:, strip].t(), x[:, strip.start :])

    def totals(self) -> tuple[Tensor, Tensor]:
        """H and C, float32 [K, K]."""
        return mirrored(self._packed), self._cross

    def upper(self) -> tuple[Tensor, Tensor]:
        """H on and above its diagonal, packed, and C; both can be added up, and then H made of it by :func:`mirrored`.

        Rows of the packed one are as many as H's and mean nothing.
        """
        return self._packed, self._cross


def mirrored(packed: Tensor) -> Tensor:
    """H [K, K] from what it is on and above its diagonal; see :meth:`Sums.upper`."""
    width = len(packed)
    gram = packed.new_empty(width, width)
    for strip, upper in zip(_strips(width), _unpacked(packed), strict=True):
        rows = strip.stop - strip.start
        corner = upper[:, :rows].triu()
        gram[strip, strip] = corner.add_(corner.triu(1).t())
        gram[strip, strip.stop :] = upper[:, rows:]
        gram[strip.stop :, strip] = upper[:, rows:].t()
    return gram


def _strips(width: int) -> list[slice]:
    """Rows of H that are computed at a time, each from its first column on."""
    step = width if width < _NARROW else -(-width // _PARTS)
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]


def _size(strips: Sequence[slice], width: int) -> int:
    return sum((strip.stop - strip.start) * (width - strip.start) for strip in strips)


def _unpacked(packed: Tensor) -> Iterator[Tensor]:
    """Views of the strips, one behind the other."""
    values, width, begin = packed.view(-1), len(packed), 0
    for strip in _strips(width):
        count = _size([strip], width)
        yield values[begin : begin + count].view(-1, width - strip.start)
        begin += count
