"""Gram sums by eight-bit products: four times as fast as float32 where the processor has VNNI.

gram.py needs, over the tokens of a batch, H += x̂ᵀx̂ and C += x̂ᵀ(x - x̂).  Both factors are rounded per channel k and
batch to eight bits, the difference x - x̂ by itself, so that it keeps its own precision however small it is:

    s_k = max_t |x̂_tk| / 127           q_tk = round(x̂_tk / s_k)          H_kl += s_k·s_l·Σ_t q_tk·q_tl
    d_k = max_t |x_tk - x̂_tk| / 127    e_tk = round((x - x̂)_tk / d_k)    C_kl += s_k·d_l·Σ_t q_tk·e_tl

The inner sums are exact, in int32: 127²·T stays below 2³¹ for batches of up to 133 000 tokens.  What is lost is
rounding, which differs from token to token and averages out.  It adds s²/12 per token to the diagonal of H: a
ten-thousandth for normally distributed inputs, half a percent where the largest of a batch is thirty times the root
mean square; both far below the damping.  Elsewhere it is a hundredth of the scatter that other tokens would bring, and
up to a tenth where there are such outliers.  H stays a sum of squares, so positive semidefinite.

    codes        one pass over x̂ and x for the scales, one for the codes; weights √w of tokens go in there
    products     torch._int_mm (oneDNN): u8/s8 dot products of four into int32
    accumulate   one pass per product: float32 += s·s·int32

Layout: x̂ and x [T, K] float32, contiguous.  Limits: CPU with AVX512_VNNI or AVX_VNNI and numba; elsewhere gram.py stays
with float32.  Inputs that are not finite come out as NaN.  Source: none known; the instruction is VPDPBUSD.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ._compiled import available as _compiles
from ._compiled import in_threads

if TYPE_CHECKING:
    from torch import Tensor

_LEVELS = np.float32(127)
MOST_TOKENS = 2**31 // 127**2 - 1


def available() -> str | None:
    """None when the processor has the instruction and numba is there; else the reason."""
    reason = _compiles()
    if reason is not None:
        return reason
    torch = importlib.import_module("torch")
    has = torch.cpu.get_capabilities()
    if has.get("avx512_vnni") or has.get("avx_vnni"):
        return None
    return "the processor multiplies eight-bit numbers no faster (no AVX512_VNNI, no AVX_VNNI)"


def reference(
    quantised: NDArray[np.floating], floats: NDArray[np.floating], root: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A batch's share of H and C in plain numpy, from x̂ and x [T, K] and √w [T]."""
    x, target, weight = quantised.astype(np.float32), floats.astype(np.float32), root.astype(np.float32)[:, None]
    factors = []
    for values in (x * weight, (target - x) * weight):
        largest = np.abs(values).max(0)
        scale = np.where(largest > 0, largest / _LEVELS, np.float32(1))
        factors.append((np.rint(values * (np.float32(1) / scale)) * scale).astype(np.float64))
    codes, error = factors
    return np.matmul(codes.T, codes), np.matmul(codes.T, error)


def run(quantised: Tensor, floats: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """A batch's share of H and C, float32 [K, K]; see :func:`add`."""
    gram, cross = (quantised.new_zeros(quantised.shape[1], quantised.shape[1]) for _ in range(2))
    add(gram, cross, [slice(0, len(gram))], quantised, floats, root)
    return gram, cross


def add(gram: Tensor, cross: Tensor, strips: list[slice], quantised: Tensor, floats: Tensor, root: Tensor) -> None:
    """Add a batch's share to H and C.

    Args:
        gram: H [K, K]; only blocks on and above the diagonal are added to.
        cross: C [K, K].
        strips: columns that together are all, in each of which H is computed from its first column on.
        quantised: x̂, float32 [T, K], at most :data:`MOST_TOKENS` tokens.
        floats: x, likewise.
        root: √w, [T].
    """
    import torch

    tokens, width = quantised.shape
    codes, other = (torch.empty(tokens, width, dtype=torch.int8) for _ in range(2))
    scale, other_scale = torch.empty(width), torch.empty(width)
    arrays = [t.contiguous().numpy() for t in (quantised, floats, root, codes, other, scale, other_scale)]
    in_threads(lambda *columns: _compiled()[0](*arrays, *columns), width)
    _accumulate(cross, torch._int_mm(codes.t(), other), scale, other_scale)
    for strip in strips:
        product = torch._int_mm(codes[:, strip].t(), codes[:, strip.start :])
        _accumulate(gram[strip, strip.start :], product, scale[strip], scale[strip.start :])


def _accumulate(total: Tensor, product: Tensor, left: Tensor, right: Tensor) -> None:
    arrays = [t.numpy() for t in (total, product, left, right)]
    in_threads(lambda *rows: _compiled()[1](*arrays, *rows), len(total))


@functools.cache
def _compiled() -> tuple[Any, Any]:
    numba = importlib.import_module("numba")
    how = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract"}}
    return numba.njit(**how)(_to_codes), numba.njit(**how)(_add_scaled)


def _to_codes(  # noqa: PLR0913, PLR0917  (compiled code takes arrays, not objects)
    quantised: Any, floats: Any, root: Any, codes: Any, other: Any, scale: Any, other_scale: Any, first: int, last: int
) -> None:
    """Scales and codes of x̂ and x - x̂, for channels ``first`` … ``last``; plain Python until it is compiled."""
    one, inverse, other_inverse = np.float32(1), np.empty_like(scale), np.empty_like(scale)
    poison = np.zeros_like(scale)  # becomes NaN for good where anything is no finite number
    scale[first:last] = 0
    other_scale[first:last] = 0
    for token in range(len(quantised)):
        for k in range(first, last):
            x = quantised[token, k] * root[token]
            error = (floats[token, k] - quantised[token, k]) * root[token]
            scale[k] = max(scale[k], abs(x))
            other_scale[k] = max(other_scale[k], abs(error))
            poison[k] += x * 0 + error * 0
    for k in range(first, last):
        scale[k] = one if scale[k] == 0 else scale[k] / _LEVELS
        other_scale[k] = one if other_scale[k] == 0 else other_scale[k] / _LEVELS
        inverse[k], other_inverse[k] = one / scale[k], one / other_scale[k]
        scale[k] += poison[k]
    for token in range(len(quantised)):
        for k in range(first, last):
            x = quantised[token, k] * root[token]
            error = (floats[token, k] - quantised[token, k]) * root[token]
            codes[token, k] = np.int8(np.rint(x * inverse[k]))
            other[token, k] = np.int8(np.rint(error * other_inverse[k]))


def _add_scaled(total: Any, product: Any, left: Any, right: Any, first: int, last: int) -> None:
    """Rows ``first`` … ``last`` of ``total`` += left · right · product."""
    for row in range(first, last):
        for column in range(total.shape[1]):
            total[row, column] += np.float32(product[row, column]) * left[row] * right[column]
