"""One weight in Gram space: its grid, its codes and its scales for given sums; the method is told in gram.py.

In: W [N, K], H and the repair of its inputs.  Out: codes and grid.  Limits: those of the kernels that are called.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from roundexport.algorithms.common import error_compensation
from roundexport.algorithms.common.latent_codes import LatentCodes
from roundexport.kernels import cholesky, gptq, gram_descent, grid_search, stored_scales
from roundexport.quant.spec import QuantSpec

_SIZED_BITS = 3  # KL 5 % better at 2 bits, level at 3, 2 % worse at 4, where little is lost
_SWEEPS_BEFORE = 2  # before a new grid search, which moves many codes again


@dataclass(frozen=True)
class Effort:
    """How far to go.

    Args:
        sweeps: most sweeps of a descent over all groups.
        searches: how often the grid is searched again.
        keep_size: at 2 and 3 bits, scale rows up so that outputs keep their size.
    """

    sweeps: int
    searches: int
    keep_size: bool


@dataclass(frozen=True, eq=False)
class Problem:
    """What the linears of one stage have in common.

    Args:
        gram: H, damped for rounding, [K, K].
        repair: H⁻¹C, [K, K]: a weight's target is ``W + W @ repair.T``.
        damping: of ``gram``.
    """

    gram: Tensor
    repair: Tensor
    damping: float

    @classmethod
    def of(cls, gram_sum: Tensor, cross: Tensor, damping: float, repair_damping: float) -> Problem:
        """From H and C."""
        return cls(
            error_compensation.damped(gram_sum, damping),
            error_compensation.solve(gram_sum, cross, repair_damping),
            damping,
        )


def round_weight(weight: Tensor, spec: QuantSpec, problem: Problem, effort: Effort, where: str) -> LatentCodes:
    """Round one weight [N, K] in Gram space.

    Args:
        weight: float32.
        spec: the scheme.
        problem: H and the repair, of its inputs.
        effort: how far to go.
        where: name of the weight in errors.

    Returns:
        Codes and grid, positions at the target.

    Raises:
        SpecError: the group size does not divide K.
    """
    spec.groups(weight.shape[1], where)
    target = torch.addmm(weight, weight, problem.repair.t())
    held = _zero_groups(weight, spec)
    if held is not None:
        _fill(target, held)
    scale, zero = grid_search.search(target, spec, problem.gram.diagonal())
    codes = gptq.run(target, problem.gram, scale, zero, spec.max_code)
    if held is not None:
        _fill(codes, held)
    rounding = gram_descent.Rounding(codes, scale, zero, spec.max_code, held)
    refit = spec.scale_dtype != "exponent8"  # a power of two has no neighbor that a small correction reaches
    gradient = rounding.gradient(target, problem.gram)
    first = min(effort.sweeps, _SWEEPS_BEFORE) if effort.searches else effort.sweeps
    gram_descent.run(rounding, gradient, problem.gram, first, refit)
    for _ in range(effort.searches):
        _search_again(rounding, gradient, problem.gram, spec, refit)
        gram_descent.run(rounding, gradient, problem.gram, effort.sweeps, refit)
    if effort.keep_size and refit and spec.bits <= _SIZED_BITS:
        rounding.scale.mul_(_stretch(rounding.weight(), target, problem.gram)[:, None])
    rounding.scale.copy_(stored_scales.stored(rounding.scale, spec))
    gram_descent.run(rounding, rounding.gradient(target, problem.gram), problem.gram, effort.sweeps, refit=False)
    return LatentCodes(spec, target, rounding.centered_codes, rounding.scale, rounding.zero_point)


def _zero_groups(weight: Tensor, spec: QuantSpec) -> Tensor | None:
    """Groups [N, G] of a weight that are 0 throughout; None: there are none."""
    held = weight.view(len(weight), spec.groups(weight.shape[1]), -1).eq(0).all(-1)
    return held if bool(held.any()) else None


def _fill(values: Tensor, groups: Tensor) -> None:
    """Set groups [N, G] of a matrix [N, K] to 0, in place."""
    values.view(*groups.shape, -1).masked_fill_(groups[..., None], 0.0)


def _search_again(
    rounding: gram_descent.Rounding, gradient: Tensor, gram_sum: Tensor, spec: QuantSpec, refit: bool
) -> None:
    """Per group, a new grid for the group's optimum given all the others; kept in the rows where the loss falls."""
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
    towards = target @ gram_sum
    own, across = (towards * target).sum(1), (towards * weight).sum(1)
    # A row with less than half of the target left does not point along it; stretching would not help.
    return torch.where(across > 0.5 * own, own / across, torch.ones_like(own))


def _loss(error: Tensor, gram_sum: Tensor) -> Tensor:
    """Loss per row [N] of an error [N, K]."""
    return ((error @ gram_sum) * error).sum(1)
