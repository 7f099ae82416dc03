"""Rows of a weight rounded for what an error of their outputs costs the model, not for the size of that error alone.

    loss = tr S (Ŵ - T) H (Ŵ - T)ᵀ        H = Σ xᵀx of inputs [K, K]        S = Σ gᵀg of outputs [N, N]

g is the gradient of the model's loss in the linear's outputs, so S ⊗ H is the Kronecker factored Fisher matrix of its
weight; what is used is S over |g| (tuning/output_fisher.py).  With S = 1 rows do not look at each other, which is
gram_rounding.py.  Where outputs count together, an error in one row can be made good by another: what GPTQ does along
columns is done along rows as well, for R rows at a time.
With e = T' - Ŵ of the rows a just rounded, and V the upper Cholesky factor of S⁻¹:

    forward     rows a by gram_rounding.py for T'           T'_b ← T'_b - (V_aa⁻¹ V_ab)ᵀ e      for all later rows b
    again       for T'_a = T_a - S_aa⁻¹ Σ_{b ≠ a} S_ab (Ŵ - T)_b, a descent from the codes at hand; all rows, twice

Within the R rows nothing is made good, so more rows at a time cost accuracy and fewer cost time; and as their own part
of S counts by its diagonal alone, a pass need not lower the loss, though it does on weights that were tried.  To S's
diagonal `damping` times its mean is added: an estimate from few tokens has directions that count for nothing only by
chance.

In: T [N, K], H [K, K] damped, S [N, N].  Out: centered codes and their grid.  Limits: N² values; a weight of many rows
is rounded in parts that know nothing of each other.  Sources: YAQA, arXiv 2505.22988 (both sides, and its factors);
K-FAC, arXiv 1503.05671.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from roundexport.quant.spec import QuantSpec

from . import cholesky, gptq, gram_descent, gram_rounding, grid_search
from .gram_rounding import Effort

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 16  # rounded together; products of such sizes are the same bits for any number of threads
_AGAIN, _SWEEPS = 2, 2  # passes over all rows at the end, and sweeps of a descent in each


def available() -> str | None:
    """None when torch is there; else the reason."""
    return cholesky.available()


def reference(
    target: NDArray[np.float32], spec: QuantSpec, gram: NDArray[np.float32], fisher: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.float32]]:
    """Centered codes, scales and zero points of the way forward alone, by systems of equations, with GPTQ's rounding.

    Args:
        target: T [N, K].
        spec: the scheme.
        gram: H.
        fisher: S, damped.
    """
    wide, rest = fisher.astype(np.float64), target.astype(np.float64)
    codes, scales, zeros = [], [], []
    for start in range(0, len(rest), _ROWS):
        own, later = slice(start, start + _ROWS), slice(start + _ROWS, None)
        aim = rest[own].astype(np.float32)
        scale, zero = grid_search.reference(aim, spec, gram.diagonal().copy())
        found = gptq.reference(aim, gram, scale, zero, spec.max_code)
        error = rest[own] - found * np.repeat(scale, target.shape[1] // scale.shape[1], axis=1)
        # S_bb x = S_ba e, with b all that is not rounded yet: the best that later rows can do against e.
        rest[later] += np.linalg.solve(wide[later, later], wide[later, own] @ error) if len(rest[later]) else 0
        codes.append(found)
        scales.append(scale)
        zeros.append(zero)
    return np.concatenate(codes), np.concatenate(scales), np.concatenate(zeros)


def damped(fisher: Tensor, damping: float) -> Tensor | None:
    """S over its mean diagonal, with ``damping`` added to it; None where no output counts."""
    mean = float(fisher.diagonal().mean())
    if not mean > 0:
        return None
    found = fisher / mean
    found.diagonal().add_(damping)
    return found


def run(
    target: Tensor,
    spec: QuantSpec,
    gram: Tensor,
    fisher: Tensor,
    effort: Effort,
    factor: Tensor | None = None,
    held: Tensor | None = None,
) -> gram_descent.Rounding:
    """Round rows of a target [N, K] that know of each other.

    Args:
        target: float32.
        spec: the scheme.
        gram: H, float32 [K, K], positive definite.
        fisher: S, float32 [N, N], positive definite; see :func:`damped`.
        effort: how far to go with R rows.
        factor: U of H (cholesky.inverse_factor), where it is at hand.
        held: groups [N, G] that are 0 in the target and stay so; None: there are none.

    Raises:
        SpecError: the group size does not divide K.
    """
    import torch

    factor = cholesky.inverse_factor(gram) if factor is None else factor
    rows = [slice(start, min(start + _ROWS, len(target))) for start in range(0, len(target), _ROWS)]
    done: list[gram_descent.Rounding] = []
    rest, upper = target.clone(), cholesky.inverse_factor(fisher)
    for own in rows:
        kept = None if held is None else held[own]
        done.append(gram_rounding.run(rest[own].contiguous(), spec, gram, effort, factor, kept))
        if own.stop < len(target):
            share = torch.linalg.solve_triangular(upper[own, own], upper[own, own.stop :], upper=True)
            rest[own.stop :].addmm_(share.t(), rest[own] - done[-1].weight(), alpha=-1)
    error = torch.cat([rounding.weight() for rounding in done]).sub_(target)
    for _ in range(_AGAIN):
        for own, rounding in zip(rows, done, strict=True):
            corner = fisher[own, own]
            others = fisher[own] @ error - corner @ error[own]
            aim = target[own] - torch.linalg.solve(corner, others)
            gram_descent.run(rounding, rounding.gradient(aim, gram), gram, _SWEEPS, refit=False)
            error[own] = rounding.weight() - target[own]
    codes, scale, zero = (
        torch.cat(own)
        for own in zip(*((part.centered_codes, part.scale, part.zero_point) for part in done), strict=True)
    )
    return gram_descent.Rounding(codes, scale, zero, spec.max_code, held)
