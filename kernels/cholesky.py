"""Cholesky factors whose bits do not depend on the number of threads.

For a positive definite H [K, K]:

    H = L Lᵀ, L lower triangular        `run`
    H⁻¹ = Uᵀ U, U upper triangular      `inverse_factor`, as GPTQ needs it
    H X = B                             `solve`

LAPACK's factorization splits sums over threads, so the last bits depend on the number of threads, and codes with them.
Measured with MKL 2024.2: matrix products, triangular solves and factors of up to 128 columns are the same bits
for 1 to 16 threads where sizes are multiples of 16; LAPACK's factors and inverses from 256 columns on are not.  So H is
factored in blocks of 128 columns: the corner by LAPACK, what is below it by a triangular solve, and what is right of it
by a product with an inner size of 128.  H is padded with ones on the diagonal to whole blocks, as products with fewer
rows and columns are split along their inner size.

    for each block:  L_jj = chol(H_jj)    L_ij = H_ij L_jj⁻ᵀ    H_ik -= L_ij L_kjᵀ

U comes without an inverse: with J the reversal of order, JHJ = M Mᵀ gives R = J M J upper triangular, H = R Rᵀ and
U = R⁻¹; one factorization in place of two and an inverse, and H's condition is not squared.  A column of U is 0 below
the diagonal, so columns are found in parts, each from the corner of R that it needs: a third of the operations.

In: float32 or float64 tensors.  Limits: 2/3·K³ operations for a factor, nearly all in matrix products.  Source: the
right-looking form in Golub and Van Loan, Matrix Computations, 4.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 128
_COLUMNS = 512  # solved together; 16 divides it


def available() -> str | None:
    """None when torch is there; else the reason."""
    from importlib.util import find_spec

    return None if find_spec("torch") else "torch is not installed; pip install 'roundexport[tune]'"


def reference(matrix: NDArray[np.floating]) -> NDArray[np.float64]:
    """L in float64."""
    return np.linalg.cholesky(matrix.astype(np.float64))


def run(matrix: Tensor, overwrite: bool = False) -> Tensor:
    """L, lower triangular [K, K].

    Args:
        matrix: H.
        overwrite: L may be made in H's own memory, which is then of no use any more; else H is copied.

    Raises:
        torch.linalg.LinAlgError: H is not positive definite.
    """
    import torch

    if len(matrix) <= _BLOCK:
        lower: Tensor = torch.linalg.cholesky(matrix)
        return lower
    padding = torch.eye(-len(matrix) % _BLOCK, dtype=matrix.dtype, device=matrix.device)
    # Products of fewer than 128 rows and columns may be split.
    own = overwrite and not len(padding)
    factor: Tensor = matrix if own else torch.block_diag(matrix, padding)  # type: ignore[no-untyped-call]
    for start in range(0, len(factor), _BLOCK):
        here, below = slice(start, start + _BLOCK), slice(start + _BLOCK, None)
        corner = torch.linalg.cholesky(factor[here, here])
        factor[here, here] = corner
        if start + _BLOCK >= len(factor):
            break
        panel = torch.linalg.solve_triangular(corner.t(), factor[below, here], upper=True, left=False)
        factor[below, here] = panel
        factor[here, below] = 0
        factor[below, below].addmm_(panel, panel.t(), alpha=-1)
    return factor[: len(matrix), : len(matrix)]


def inverse_factor(matrix: Tensor) -> Tensor:
    """U, upper triangular [K, K] with UᵀU = H⁻¹.

    Raises:
        torch.linalg.LinAlgError: H is not positive definite.
    """
    right = reversed_factor(matrix)
    upper = right.new_zeros(right.shape)
    for part in columns(len(right)):
        upper[: part.stop, part] = inverse_columns(right, part)
    return upper


def reversed_factor(matrix: Tensor) -> Tensor:
    """R, upper triangular [K, K] with H = R Rᵀ.

    Raises:
        torch.linalg.LinAlgError: H is not positive definite.
    """
    return run(matrix.flip(0, 1), overwrite=True).flip(0, 1)


def inverse_columns(right: Tensor, part: slice) -> Tensor:
    """Some columns of U = R⁻¹, down to the diagonal: [last column, columns].

    Args:
        right: R.
        part: one of :func:`columns`.
    """
    import torch

    one = right.new_zeros(part.stop, part.stop - part.start)
    one[part.start :].fill_diagonal_(1.0)
    upper: Tensor = torch.linalg.solve_triangular(right[: part.stop, : part.stop], one, upper=True)
    return upper


def columns(count: int) -> list[slice]:
    """Columns of a right side, or of U, in parts of fixed size, whose bits do not depend on who solves which."""
    return [slice(start, min(start + _COLUMNS, count)) for start in range(0, count, _COLUMNS)]


def solve(factor: Tensor, right: Tensor) -> Tensor:
    """X [K, M] with L Lᵀ X = B.

    Args:
        factor: L.
        right: B [K, M].
    """
    import torch

    half = torch.linalg.solve_triangular(factor, right, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(factor.t(), half, upper=True)
    return solved
