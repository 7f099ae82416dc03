"""XᵀX and Xᵀ(Y - X) by eight-bit products: several times faster than float32 on processors with VNNI or AMX.

gram.py needs, over the tokens of a batch, H += x̂ᵀx̂ and C += x̂ᵀd with d = x - x̂.  Per channel k and batch, inputs are
rounded to eight bits, and differences to two eight-bit parts, the second of which holds the remainder of the first:

    s_k = max_t |x̂_tk| / 127      q_tk = round(x̂_tk / s_k)                  H_kl += s_k·s_l·Σ_t q_tk·q_tl
    r_l = max_t |d_tl| / 127      h_tl = round(d_tl / r_l)
                                  g_tl = round(254·(d_tl / r_l - h_tl))     C_kl += s_k·r_l·Σ_t q_tk·(h + g / 254)_tl

The inner sums are exact in int32: 127²·T stays below 2³¹ for batches of up to 133 000 tokens.  The only error is the
rounding of x̂, which is nearly independent between tokens and averages out.  It adds s²/12 per token to the diagonal of
H: one ten-thousandth for normally distributed inputs, half a percent where the largest value of a batch is thirty times
the root mean square; both are far below the damping.  Off the diagonal it is a hundredth of the difference that other
calibration tokens would make.  H stays a sum of squares, so positive semidefinite.

Differences are heavy-tailed and mostly cancel.  With one eight-bit part for them an encoder's loss under `default` rose
by a twentieth (docs/lab-notes.md).  With two parts the error is a 64 000th of the largest difference.

    codes        one pass over x̂, d for the scales, one for the codes
    products     torch._int_mm (oneDNN): dot products of four into int32
    accumulate   one pass per product: float32 += s·s·int32

Layout: x̂, d [T, K] float32, contiguous.  Limits: CPU with AVX512_VNNI or AVX_VNNI and numba; elsewhere gram.py uses
float32.  Inputs that are not finite come out as NaN.  Source: none known; the instructions are VPDPBUSD, TDPBSSD.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ._numba import available as _compiles
from ._numba import in_threads, njit
from ._processor import short_products

if TYPE_CHECKING:
    from torch import Tensor

_LEVELS = np.float32(127)
_FINER = np.float32(254)  # steps of the second part in one of the first, of which it covers half on either side
MOST_TOKENS = 2**31 // 127**2 - 1


def available() -> str | None:
    """None when the processor has the instruction and numba is there; else the reason."""
    reason = _compiles()
    if reason is not None:
        return reason
    if short_products() & {"avx512_vnni", "avx_vnni"}:
        return None
    return "the processor multiplies eight-bit numbers no faster (no AVX512_VNNI, no AVX_VNNI)"


def reference(
    quantized: NDArray[np.floating], floats: NDArray[np.floating], weights: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A batch's share of H and C in plain numpy, from x̂ and x [T, K] and weights [T]."""
    root = np.sqrt(weights.astype(np.float32))[:, None]
    (q, s), (d, r) = (_scaled(t.astype(np.float32) * root) for t in (quantized, floats - quantized))
    h = np.rint(d)
    x, twice = np.rint(q) * s, (h + np.rint((d - h) * _FINER) / _FINER.astype(np.float64)) * r
    return x.T @ x, x.T @ twice


def _scaled(values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Values in units of their channel's scale, and the scale."""
    largest = np.abs(values).max(0)
    scale: NDArray[np.float32] = np.where(largest > 0, largest / _LEVELS, np.float32(1)).astype(np.float32)
    return values * (np.float32(1) / scale), scale.astype(np.float64)


def run(quantized: Tensor, floats: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """A batch's share of H and C, float32 [K, K]; see :func:`add`."""
    gram, cross = (quantized.new_zeros(quantized.shape[1], quantized.shape[1]) for _ in range(2))
    add([gram], cross, [slice(0, len(gram))], quantized, floats, weights)
    return gram, cross


def add(
    gram: Sequence[Tensor], cross: Tensor, strips: Sequence[slice], quantized: Tensor, floats: Tensor, weights: Tensor
) -> None:
    """Add a batch's share to H and C.

    Args:
        gram: H strip by strip, of each its rows from the strip's first column on.
        cross: C [K, K].
        strips: rows that together are all.
        quantized: x̂, float32 [T, K], at most :data:`MOST_TOKENS` tokens.
        floats: x, likewise.
        weights: w [T].
    """
    import torch

    (codes, high, low), (scale, step) = _codes(quantized, floats, weights)
    for strip, upper in zip(strips, gram, strict=True):
        left, each = codes[:, strip].t(), scale[strip]
        right = slice(strip.start, None)
        _accumulate(upper, torch._int_mm(left, codes[:, right]), each, scale[right])
        _accumulate(cross[strip], torch._int_mm(left, high), each, step)
        _accumulate(cross[strip], torch._int_mm(left, low), each, step / _FINER)


def _codes(quantized: Tensor, floats: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """q, h and g, int8 [3, T, K]; s and r, float32 [2, K]."""
    import torch

    codes, scales = torch.empty(3, *quantized.shape, dtype=torch.int8), torch.empty(2, quantized.shape[1])
    arrays = [t.numpy() for t in (quantized.contiguous(), floats.contiguous(), weights.sqrt(), codes, scales)]
    in_threads(lambda *columns: _compiled()[0](*arrays, *columns), scales.shape[1])
    return codes, scales


def _accumulate(total: Tensor, product: Tensor, left: Tensor, right: Tensor) -> None:
    arrays = [t.numpy() for t in (total, product, left, right)]
    in_threads(lambda *rows: _compiled()[1](*arrays, *rows), len(total))


@functools.cache
def _compiled() -> tuple[Any, Any]:
    return njit(_to_codes, fastmath={"contract"}), njit(_add_scaled, fastmath={"contract"})


def _to_codes(quantized: Any, floats: Any, root: Any, codes: Any, scales: Any, first: int, last: int) -> None:
    """Codes and scales of channels ``first`` … ``last``; plain Python until it is compiled."""
    scales = scales[:, first:last]  # slices, as indices from 0 on let the compiler work on many channels at once
    largest, inverse = np.zeros_like(scales), np.empty_like(scales)
    poison = np.zeros_like(scales[0])  # NaN for good where an input is none
    for token in range(len(quantized)):
        inputs, target = quantized[token, first:last], floats[token, first:last]
        for k in range(len(inputs)):
            x = inputs[k] * root[token]
            d = (target[k] - inputs[k]) * root[token]
            largest[0, k] = abs(x) if abs(x) > largest[0, k] else largest[0, k]  # as max() keeps to one at a time
            largest[1, k] = abs(d) if abs(d) > largest[1, k] else largest[1, k]
            poison[k] += d * 0
    for part in range(2):
        for k in range(len(poison)):
            scales[part, k] = np.float32(1) if largest[part, k] == 0 else largest[part, k] / _LEVELS
            inverse[part, k] = np.float32(1) / scales[part, k]
            scales[part, k] += poison[k]
    for token in range(len(quantized)):
        inputs, target = quantized[token, first:last], floats[token, first:last]
        code, high, low = codes[0, token, first:last], codes[1, token, first:last], codes[2, token, first:last]
        for k in range(len(inputs)):
            x = inputs[k] * root[token]
            d = (target[k] - inputs[k]) * root[token] * inverse[1, k]
            code[k] = np.int32(np.rint(inputs[k] * root[token] * inverse[0, k]))
            high[k] = np.int32(np.rint(d))
            low[k] = np.int32(np.rint((d - np.rint(d)) * _FINER))


def _add_scaled(total: Any, product: Any, left: Any, right: Any, first: int, last: int) -> None:
    """Rows ``first`` … ``last`` of ``total`` += left · right · product."""
    for row in range(first, last):
        for column in range(total.shape[1]):
            total[row, column] += np.float32(product[row, column]) * left[row] * right[column]
