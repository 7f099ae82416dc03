"""GPTQ rounding: columns in turn; the columns not yet rounded compensate the error of each.

With the grid fixed (scale, zero point per group) and U the upper Cholesky factor of H⁻¹, for each column j of T:

    c_j = clamp(round(t_j / s), -z, L - z)        e = (t_j - s·c_j) / U_jj        t_k ← t_k - e·U_jk   for k > j

This is the optimal correction of the remaining columns for the output error (t - ŵ) H (t - ŵ)ᵀ.  Columns are processed
in blocks: inside a block row by row (compiled, rows in parallel), then one matrix product applies the block's errors to
all later columns.  K²·N operations, nearly all in that product.

In: target [N, K], H [K, K] positive definite (damped), grid [N, G].  Out: centered codes c = code - z, [N, K].
Limits: columns keep the model's order (no act-order), so that groups stay contiguous.
Source: Frantar et al., GPTQ, arXiv 2210.17323.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import cholesky
from ._numba import available, in_threads, njit

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 128  # columns rounded before their errors are passed on


def reference(
    target: NDArray[np.floating],
    gram: NDArray[np.floating],
    scale: NDArray[np.floating],
    zero_point: NDArray[np.floating],
    max_code: int,
) -> NDArray[np.float64]:
    """Centered codes c in float64, column by column."""
    factor = np.linalg.cholesky(np.linalg.inv(gram.astype(np.float64))).T
    rest = target.astype(np.float64).copy()
    width = rest.shape[1] // scale.shape[1]
    centered_codes = np.zeros_like(rest)
    for j in range(rest.shape[1]):
        s, z = scale[:, j // width].astype(np.float64), zero_point[:, j // width].astype(np.float64)
        centered_codes[:, j] = np.clip(np.rint(rest[:, j] / s), -z, max_code - z)
        error = (rest[:, j] - s * centered_codes[:, j]) / factor[j, j]
        rest[:, j:] -= error[:, None] * factor[j, j:]
    return centered_codes


def run(
    target: Tensor, gram: Tensor, scale: Tensor, zero_point: Tensor, max_code: int, factor: Tensor | None = None
) -> Tensor:
    """Round with the compiled loop on a CPU, column by column in torch elsewhere.

    Args:
        target: float32 [N, K].
        gram: H, float32 [K, K], positive definite.
        scale: float32 [N, G], not 0.
        zero_point: float32 whole numbers [N, G].
        max_code: L.
        factor: U (cholesky.inverse_factor), where it is at hand; H is then not looked at.

    Returns:
        Steps c, float32 whole numbers [N, K].
    """
    import torch

    factor = cholesky.inverse_factor(gram) if factor is None else factor
    rest, centered_codes = target.clone(), torch.empty_like(target)
    columns = target.shape[1]
    width = columns // scale.shape[1]
    compiled = target.device.type == "cpu" and available() is None
    for start in range(0, columns, _BLOCK):
        part = slice(start, min(start + _BLOCK, columns))
        group = torch.arange(part.start, part.stop, device=target.device) // width
        grid = scale[:, group].contiguous(), zero_point[:, group].contiguous()
        block, corner = rest[:, part].contiguous(), factor[part, part].contiguous()
        centered_codes[:, part], errors = (_columns_compiled if compiled else _columns)(block, corner, *grid, max_code)
        rest[:, part.stop :].addmm_(errors, factor[part, part.stop :], alpha=-1)
    return centered_codes


def _columns(block: Tensor, corner: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> tuple[Tensor, Tensor]:
    import torch

    codes, errors = torch.empty_like(block), torch.empty_like(block)
    for j in range(block.shape[1]):
        s, z = scale[:, j], zero[:, j]
        codes[:, j] = torch.maximum(torch.minimum(torch.round(block[:, j] / s), max_code - z), -z)
        errors[:, j] = (block[:, j] - s * codes[:, j]) / corner[j, j]
        block[:, j:] -= errors[:, j : j + 1] * corner[j, j:]
    return codes, errors


def _columns_compiled(
    block: Tensor, corner: Tensor, scale: Tensor, zero: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    import torch

    codes, errors = torch.empty_like(block), torch.empty_like(block)
    arrays = [tensor.numpy() for tensor in (block, corner, scale, zero, codes, errors)]
    loop = _compiled()
    in_threads(lambda *rows: loop(*arrays, np.float32(max_code), *rows), len(block))
    return codes, errors


@functools.cache
def _compiled() -> Any:
    return njit(_rows, fastmath={"contract"})


def _rows(  # noqa: PLR0913, PLR0917  (compiled code takes arrays, not objects)
    block: Any, corner: Any, scale: Any, zero: Any, codes: Any, errors: Any, max_code: Any, first: int, last: int
) -> None:
    """:func:`_columns` for rows ``first`` … ``last``; plain Python until it is compiled."""
    for row in range(first, last):
        w = block[row]
        for j in range(block.shape[1]):
            s, z = scale[row, j], zero[row, j]
            c = min(max(np.rint(w[j] / s), -z), max_code - z)
            error = (w[j] - s * c) / corner[j, j]
            codes[row, j] = c
            errors[row, j] = error
            for k in range(j, block.shape[1]):
                w[k] -= error * corner[j, k]
