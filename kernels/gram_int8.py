"""XᵀX by eight-bit products: four times as fast as float32 where the processor has VNNI.

gram.py needs, over the tokens of a batch, H += x̂ᵀx̂.  Inputs are rounded per channel k and batch to eight bits:

    s_k = max_t |x̂_tk| / 127        q_tk = round(x̂_tk / s_k)        H_kl += s_k·s_l·Σ_t q_tk·q_tl

The inner sums are exact, in int32: 127²·T stays below 2³¹ for batches of up to 133 000 tokens.  What is lost is
rounding, which differs from token to token and averages out.  It adds s²/12 per token to the diagonal of H: a
ten-thousandth for normally distributed inputs, half a percent where the largest of a batch is thirty times the root
mean square; both far below the damping.  Elsewhere it is a hundredth of the scatter that other tokens would bring.  H
stays a sum of squares, so positive semidefinite.

The other sum, C = x̂ᵀ(x - x̂), stays float32: its differences are heavy-tailed and mostly cancel, and in eight bits it
cost an encoder a twentieth of what `default` loses (DECISIONS.md).

    codes        one pass over x̂ for the scales, one for the codes
    products     torch._int_mm (oneDNN): dot products of four into int32
    accumulate   one pass per product: float32 += s·s·int32

Layout: x̂ [T, K] float32, contiguous.  Limits: CPU with AVX512_VNNI or AVX_VNNI and numba; elsewhere gram.py stays with
float32.  Inputs that are not finite come out as NaN.  Source: none known; the instruction is VPDPBUSD.
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


def reference(inputs: NDArray[np.floating]) -> NDArray[np.float64]:
    """A batch's share of H in plain numpy, from x̂ [T, K]."""
    values = inputs.astype(np.float32)
    largest = np.abs(values).max(0)
    scale = np.where(largest > 0, largest / _LEVELS, np.float32(1))
    rounded = (np.rint(values * (np.float32(1) / scale)) * scale).astype(np.float64)
    found: NDArray[np.float64] = np.matmul(rounded.T, rounded)
    return found


def run(inputs: Tensor) -> Tensor:
    """A batch's share of H, float32 [K, K]; see :func:`add`."""
    gram = inputs.new_zeros(inputs.shape[1], inputs.shape[1])
    add(gram, [slice(0, len(gram))], inputs)
    return gram


def add(gram: Tensor, strips: list[slice], inputs: Tensor) -> None:
    """Add a batch's share to H.

    Args:
        gram: H [K, K]; only blocks on and above the diagonal are added to.
        strips: columns that together are all, in each of which H is computed from its first column on.
        inputs: x̂, float32 [T, K], at most :data:`MOST_TOKENS` tokens.
    """
    import torch

    codes, scale = torch.empty(inputs.shape, dtype=torch.int8), torch.empty(inputs.shape[1])
    arrays = [t.numpy() for t in (inputs.contiguous(), codes, scale)]
    in_threads(lambda *columns: _compiled()[0](*arrays, *columns), len(scale))
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


def _to_codes(inputs: Any, codes: Any, scale: Any, first: int, last: int) -> None:
    """Scales and codes of channels ``first`` … ``last``; plain Python until it is compiled."""
    inverse, poison = np.empty_like(scale), np.zeros_like(scale)  # the second is NaN for good where an input is none
    scale[first:last] = 0
    for token in range(len(inputs)):
        for k in range(first, last):
            scale[k] = max(scale[k], abs(inputs[token, k]))
            poison[k] += inputs[token, k] * 0
    for k in range(first, last):
        scale[k] = np.float32(1) if scale[k] == 0 else scale[k] / _LEVELS
        inverse[k] = np.float32(1) / scale[k]
        scale[k] += poison[k]
    for token in range(len(inputs)):
        for k in range(first, last):
            codes[token, k] = np.int8(np.rint(inputs[token, k] * inverse[k]))


def _add_scaled(total: Any, product: Any, left: Any, right: Any, first: int, last: int) -> None:
    """Rows ``first`` … ``last`` of ``total`` += left · right · product."""
    for row in range(first, last):
        for column in range(total.shape[1]):
            total[row, column] += np.float32(product[row, column]) * left[row] * right[column]
