"""Rows of a weight in Gram space: their grid, codes and scales for given sums; the method is told in gram.py.

In: W [n, K], H and the repair of its inputs.  Out: codes and grid.  Limits: those of the kernels that are called.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from roundexport.algorithms.parts import RoundedRows, row_parts
from roundexport.kernels import gram_rounding, two_sided
from roundexport.kernels.gram_rounding import Effort
from roundexport.quant.spec import QuantSpec


def round_rows(
    weight: Tensor,
    spec: QuantSpec,
    problem: Mapping[str, Tensor],
    effort: Effort,
    keeps_target: bool = False,
    fisher: Tensor | None = None,
) -> RoundedRows:
    """Round rows of a weight [n, K] in Gram space.

    Args:
        weight: float32.
        spec: the scheme.
        problem: of its inputs, see `Problem.tensors` (_gram_problem.py); of ``shift`` the same rows.  Without
            a repair the weight itself is the target.
        effort: how far to go.
        keeps_target: also return what was aimed at.
        fisher: S of these rows, damped, [n, n]; None: they do not look at each other.

    Raises:
        SpecError: the group size does not divide K.
    """
    gram = problem["gram"]
    target, held = weight, _zero_groups(weight, spec)
    if "repair" in problem:
        target = torch.addmm(weight, weight, problem["repair"].t())
        if "shift" in problem:
            target += problem["shift"]
        if held is not None:
            _fill(target, held)
    if fisher is None:
        rounding = gram_rounding.run(target, spec, gram, effort, problem["factor"], held)
    else:
        rounding = two_sided.run(target, spec, gram, fisher, effort, problem["factor"], held)
    grouped = rounding.centered_codes.view(*rounding.scale.shape, -1) + rounding.zero_point[..., None]
    codes = grouped.to(torch.uint8).view_as(target)
    return RoundedRows(codes, rounding.scale, rounding.zero_point, target if keeps_target else None)


def round_weight(weight: Tensor, spec: QuantSpec, problem: Mapping[str, Tensor], effort: Effort) -> RoundedRows:
    """The same of all rows that there are, in parts of fixed size; a part is float32 in its turn."""
    parts = [slice(part.start, part.stop) for part in row_parts(len(weight))]
    return RoundedRows.joined([round_rows(weight[part].float(), spec, problem, effort) for part in parts])


def _zero_groups(weight: Tensor, spec: QuantSpec) -> Tensor | None:
    """Groups [N, G] of a weight that are 0 throughout; None: there are none."""
    held = weight.view(len(weight), spec.groups(weight.shape[1]), -1).eq(0).all(-1)
    return held if bool(held.any()) else None


def _fill(values: Tensor, groups: Tensor) -> None:
    """Set groups [N, G] of a matrix [N, K] to 0, in place."""
    values.view(*groups.shape, -1).masked_fill_(groups[..., None], 0.0)
