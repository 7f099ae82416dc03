"""A start for codes in Gram space, group after group, each for what the columns to come can compensate.

GPTQ (gptq.py) takes grids that were fixed beforehand.  Here a group's grid and codes are chosen together, when its turn
comes, for the target t that the groups before it have left.  Whatever its error e, the columns r to come can still take
over a part of it; with them at their best continuous values, the row loses

    e S eᵀ        S = H_gg - H_gr H_rr⁻¹ H_rg = R_gg R_ggᵀ

for the group g, where H = R Rᵀ with R upper triangular, the inverse of GPTQ's U.  So S takes the place of H:

    grid      searched for t, weighted by diag S                                                  (grid_search.py)
    codes     GPTQ within the group, then one visit of the descent, scale in closed form             (gram_descent.py)
    rest      the columns to come take over the error: t_r ← t_r - (t_g - ŵ_g) R_gg U_gr

In: target [N, K], H [K, K] positive definite (damped).  Out: centered codes and their grid, scales not yet as stored.
Limits: groups keep the model's order; where one group is the whole row, S is H.  Source: SchurOpt, arXiv 2608.15567.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from roundexport.quant.spec import QuantSpec

from . import cholesky, gptq, gram_descent, grid_search

if TYPE_CHECKING:
    from torch import Tensor


def available() -> str | None:
    """None when torch is there; else the reason."""
    return cholesky.available()


def reference(
    target: NDArray[np.float32], spec: QuantSpec, gram: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float32]]:
    """Centered codes, scales and zero points, with S by its definition and the rest by a system of equations."""
    wide, rest = gram.astype(np.float64), target.astype(np.float64)
    groups = spec.groups(target.shape[1])
    width = target.shape[1] // groups
    codes, scales, zeros = [], [], []
    for group in range(groups):
        own, later = slice(0, width), slice(width, None)
        left = wide[group * width :, group * width :]
        towards = np.linalg.solve(left[later, later], left[later, own])
        curvature = left[own, own] - left[own, later] @ towards
        aim, whole = rest[:, own], QuantSpec(spec.bits, None, spec.symmetric, spec.scale_dtype)
        weights = curvature.diagonal().astype(np.float32)
        scale, zero = grid_search.reference(aim.astype(np.float32), whole, weights)
        start = gptq.reference(aim, curvature, scale, zero, spec.max_code)
        gradient = (start * scale - aim) @ curvature
        low, high, refit = -zero[:, 0], spec.max_code - zero[:, 0], spec.scale_dtype != "exponent8"
        found, size = gram_descent.reference(start, scale[:, 0], low, high, gradient, curvature, refit=refit)
        rest = rest[:, later] + (aim - found * size[:, None]) @ towards.T
        codes.append(found)
        scales.append(size)
        zeros.append(zero[:, 0])
    return np.concatenate(codes, 1), np.stack(scales, 1), np.stack(zeros, 1)


def run(
    target: Tensor, spec: QuantSpec, gram: Tensor, factor: Tensor | None = None, held: Tensor | None = None
) -> gram_descent.Rounding:
    """Grid and codes of rows.

    Args:
        target: float32 [N, K].
        spec: the scheme.
        gram: H, float32 [K, K], positive definite.
        factor: U of H (cholesky.inverse_factor), where it is at hand.
        held: groups [N, G] whose codes stay 0; None: no group.

    Raises:
        SpecError: the group size does not divide K.
    """
    import torch

    factor = cholesky.inverse_factor(gram) if factor is None else factor
    groups = spec.groups(target.shape[1])
    width = target.shape[1] // groups
    whole = QuantSpec(spec.bits, None, spec.symmetric, spec.scale_dtype)
    one = torch.eye(width, dtype=target.dtype, device=target.device)
    rest, codes = target.clone(), torch.empty_like(target)
    scale, zero = (target.new_empty(len(target), groups) for _ in range(2))
    for group in range(groups):
        part = slice(group * width, (group + 1) * width)
        aim, corner = rest[:, part].contiguous(), factor[part, part].contiguous()
        right = torch.linalg.solve_triangular(corner, one, upper=True) if groups > 1 else one
        curvature = right @ right.t() if groups > 1 else gram
        grid = grid_search.search(aim, whole, curvature.diagonal())
        start = gptq.run(aim, curvature, *grid, spec.max_code, corner)
        fixed = None if held is None else held[:, group : group + 1]
        if fixed is not None:
            start.masked_fill_(fixed, 0.0)
        found = gram_descent.Rounding(start, *grid, spec.max_code, fixed)
        # A power of two has no neighbor that a small correction reaches.
        refit = spec.scale_dtype != "exponent8"
        gram_descent.run(found, found.gradient(aim, curvature), curvature, 1, refit)
        codes[:, part] = found.centered_codes
        scale[:, group], zero[:, group] = found.scale[:, 0], found.zero_point[:, 0]
        if part.stop < target.shape[1]:
            error = (aim - found.weight()) @ right
            rest[:, part.stop :].addmm_(error, factor[part, part.stop :], alpha=-1)
    return gram_descent.Rounding(codes, scale, zero, spec.max_code, held)
