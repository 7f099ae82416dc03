"""Rows of a weight in Gram space: their grid, codes and scales for given sums; the method is told in gram.py.

In: W [n, K], H and the repair of its inputs.  Out: codes and grid.  Limits: those of the kernels that are called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from roundexport.algorithms.parts import RoundedRows
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


def round_rows(
    weight: Tensor, spec: QuantSpec, problem: Mapping[str, Tensor], effort: Effort, keeps_target: bool = False
) -> RoundedRows:
    """Round rows of a weight [n, K] in Gram space.

    Args:
        weight: float32.
        spec: the scheme.
        problem: of its inputs, see `Problem.tensors` (_gram_problem.py); of ``shift`` the same rows.
        effort: how far to go.
        keeps_target: also return what was aimed at.

    Raises:
        SpecError: the group size does not divide K.
    """
    gram = problem["gram"]
    target = torch.addmm(weight, weight, problem["repair"].t())
    if "shift" in problem:
        target += problem["shift"]
    held = _zero_groups(weight, spec)
    if held is not None:
        _fill(target, held)
    scale, zero = grid_search.search(target, spec, gram.diagonal())
    codes = gptq.run(target, gram, scale, zero, spec.max_code, problem["factor"])
    if held is not None:
        _fill(codes, held)
    rounding = gram_descent.Rounding(codes, scale, zero, spec.max_code, held)
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
    grouped = rounding.centered_codes.view(*rounding.scale.shape, -1) + rounding.zero_point[..., None]
    codes = grouped.to(torch.uint8).view_as(target)
    return RoundedRows(codes, rounding.scale, rounding.zero_point, target if keeps_target else None)


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
