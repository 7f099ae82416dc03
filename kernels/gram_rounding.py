"""Rows of a weight rounded in Gram space: the codes and scales that lose least on inputs with given sums H = Σ xᵀx.

    loss = tr (Ŵ - T) H (Ŵ - T)ᵀ

    grid      scale and zero point per group, searched for T weighted by diag H                     (grid_search.py)
    start     columns in turn, later columns compensate the error of each                           (gptq.py)
              or, by groups, grid and start of a group when its turn comes                          (group_start.py)
    descend   every code to its best given all the others, scales refitted in closed form           (gram_descent.py)
    again     per group: a new grid search for the group's optimum given all the others, kept where it is better
    size      at 2 and 3 bits, scales of a row stretched by t H tᵀ / ŵ H tᵀ, so that its output keeps its size

The last step is needed because a least-squares fit is shorter than its target, and these losses multiply over layers.
`reference` is grid and start in numpy, which `run` gives with an effort of nothing.

In: T [N, K], H [K, K] positive definite (damped).  Out: centered codes and their grid.  Limits: those of the kernels
that are called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from roundexport.quant.spec import QuantSpec

from . import cholesky, gptq, gram_descent, grid_search, group_start, stored_scales

if TYPE_CHECKING:
    from torch import Tensor

_SIZED_BITS = 3  # KL 5 % better at 2 bits, level at 3, 2 % worse at 4, where little is lost
_FACTORED = 1e-6  # of the trace: the largest direction is at most so much larger than the least
_SWEEPS_BEFORE = 2  # before a new grid search, which moves many codes again


@dataclass(frozen=True)
class Effort:
    """How far to go.

    Args:
        sweeps: most sweeps of a descent over all groups.
        searches: how often the grid is searched again.
        keep_size: at 2 and 3 bits, scale rows up so that outputs keep their size.
        by_groups: grid and start of a group when its turn comes; else all grids, then GPTQ.
    """

    sweeps: int
    searches: int
    keep_size: bool
    by_groups: bool = False


def available() -> str | None:
    """None when torch is there; else the reason."""
    return cholesky.available()


def usual_share(gram_sum: Tensor, damping: float) -> float:
    """The same with the size of a usual input, the mean by roots (mean √H_kk)², which few massive inputs hardly move.

    At least a millionth of H's trace, so that float32 can factor it.
    """
    usual = float(gram_sum.diagonal().sqrt().mean()) ** 2
    return max(damping * usual, _FACTORED * float(gram_sum.diagonal().sum())) or 1.0


def reference(
    target: NDArray[np.float32], spec: QuantSpec, gram: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.float32]]:
    """Centered codes, scales and zero points of grid and start alone."""
    scale, zero = grid_search.reference(target, spec, gram.diagonal().copy())
    return gptq.reference(target, gram, scale, zero, spec.max_code), scale, zero


def run(
    target: Tensor,
    spec: QuantSpec,
    gram: Tensor,
    effort: Effort,
    factor: Tensor | None = None,
    held: Tensor | None = None,
) -> gram_descent.Rounding:
    """Round rows of a target [N, K].

    Args:
        target: float32.
        spec: the scheme.
        gram: H, float32 [K, K], positive definite.
        effort: how far to go.
        factor: U of H (cholesky.inverse_factor), where it is at hand.
        held: groups [N, G] that are 0 in the target and stay so; None: there are none.

    Raises:
        SpecError: the group size does not divide K.
    """
    start = group_start.run if effort.by_groups else _by_columns
    rounding = start(target, spec, gram, factor, held)
    refit = spec.scale_dtype != "exponent8"  # a power of two has no neighbor that a small correction reaches
    gradient = rounding.gradient(target, gram)
    first = min(effort.sweeps, _SWEEPS_BEFORE) if effort.searches else effort.sweeps
    gram_descent.run(rounding, gradient, gram, first, refit)
    for _ in range(effort.searches):
        _search_again(rounding, gradient, gram, spec, refit)
        gram_descent.run(rounding, gradient, gram, effort.sweeps, refit)
    if effort.keep_size and refit and spec.bits <= _SIZED_BITS:
        rounding.scale.mul_(_stretch(rounding.weight(), target, gram)[:, None])
    rounding.scale.copy_(stored_scales.stored(rounding.scale, spec))
    gram_descent.run(rounding, rounding.gradient(target, gram), gram, effort.sweeps, refit=False)
    return rounding


def _by_columns(
    target: Tensor, spec: QuantSpec, gram: Tensor, factor: Tensor | None, held: Tensor | None
) -> gram_descent.Rounding:
    """All grids, then GPTQ."""
    scale, zero = grid_search.search(target, spec, gram.diagonal())
    codes = gptq.run(target, gram, scale, zero, spec.max_code, factor)
    if held is not None:
        codes.view(*held.shape, -1).masked_fill_(held[..., None], 0.0)
    return gram_descent.Rounding(codes, scale, zero, spec.max_code, held)


def _search_again(
    rounding: gram_descent.Rounding, gradient: Tensor, gram_sum: Tensor, spec: QuantSpec, refit: bool
) -> None:
    """Per group, a new grid for the group's optimum given all the others; kept in the rows where the loss falls."""
    import torch

    groups = rounding.scale.shape[1]
    width = gradient.shape[1] // groups
    whole = QuantSpec(spec.bits, None, spec.symmetric, spec.scale_dtype)
    for group in range(groups):
        part = slice(group * width, (group + 1) * width)
        corner = gram_sum[part, part].contiguous()
        now = rounding.centered_codes[:, part] * rounding.scale[:, group : group + 1]
        wanted = now - cholesky.solve(cholesky.run(corner), gradient[:, part].t()).t()
        scale, zero = grid_search.search(wanted, whole, corner.diagonal())
        codes = torch.round(wanted / scale).clamp_(-zero, spec.max_code - zero)
        other = gram_descent.Rounding(codes, scale, zero, spec.max_code)
        gram_descent.run(other, other.gradient(wanted, corner), corner, 1, refit, passes=6)
        new = other.weight()
        better = _loss(new - wanted, corner) < _loss(now - wanted, corner)
        if rounding.held is not None:
            better &= ~rounding.held[:, group]
        gradient.addmm_(torch.where(better[:, None], new - now, 0), gram_sum[part])
        rounding.centered_codes[:, part] = torch.where(
            better[:, None], other.centered_codes, rounding.centered_codes[:, part]
        )
        for kept, found in ((rounding.scale, other.scale), (rounding.zero_point, other.zero_point)):
            kept[:, group] = torch.where(better, found[:, 0], kept[:, group])


def _stretch(weight: Tensor, target: Tensor, gram_sum: Tensor) -> Tensor:
    """Factor per row [N] that gives outputs their size back."""
    import torch

    towards = target @ gram_sum
    own, across = (towards * target).sum(1), (towards * weight).sum(1)
    # A row with less than half of the target left does not point along it; stretching would not help.
    return torch.where(across > 0.5 * own, own / across, torch.ones_like(own))


def _loss(error: Tensor, gram_sum: Tensor) -> Tensor:
    """Loss per row [N] of an error [N, K]."""
    return ((error @ gram_sum) * error).sum(1)
