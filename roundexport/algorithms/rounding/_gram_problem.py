"""What the linears of a stage have in common, from sums over their inputs: H for rounding, the repair of W, and U.

    choice     the repair's damping λ: an error on held-out samples for each of three to five   (error_compensation.py)
    factors    L of H + λ·mean(diag H)·I for the repair, R of the damped H for U                 (kernels/cholesky.py)
    columns    H⁻¹C, H⁻¹D and U = R⁻¹, 512 columns at a time

That is 5·K³ operations, and nearly all that a process would do by itself where the rest of a block is shared.  So the
dampings of a choice, the two factors, and the columns are parts too, which whoever is there does (algorithms/parts.py);
narrow inputs are solved where they are, as messages would cost more.  The numbers are the same either way.

In: H, C and D, and the weights.  Out: :class:`Problem`.  Limits: five matrices of K × K are held at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from roundexport.algorithms.common import error_compensation
from roundexport.algorithms.common.error_compensation import InputSums
from roundexport.algorithms.parts import Held, Shared
from roundexport.kernels import cholesky, gram_rounding

_WIDE = 1024  # inputs from which others are worth asking

Item = TypeVar("Item")
Result = TypeVar("Result")


class Doer(Protocol):
    """Who does parts; :class:`roundexport.algorithms.parts.Parts` is one."""

    def map(self, function: Callable[[Any, Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """What a function gives for each item, in order."""

    def share(self, tensors: Mapping[str, Tensor]) -> Shared:
        """Let functions look at tensors."""


class Alone:
    """This process."""

    def map(self, function: Callable[[Any, Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """See :class:`Doer`."""
        return (function(self, item) for item in items)

    def share(self, tensors: Mapping[str, Tensor]) -> Shared:
        """See :class:`Doer`."""
        return Held(tensors)


@dataclass(frozen=True, eq=False)
class Problem:
    """What the linears of one stage have in common.

    Args:
        gram: H, damped for rounding, [K, K].
        repair: H⁻¹C, [K, K]: a weight's target is ``W + W @ repair.T``.
        factor: U of ``gram`` (kernels/cholesky.py).
        added: to the diagonal of ``gram``.
        shift: (H⁻¹D)ᵀ, [N, K], which the target of a linear that writes to the residual stream has beside.
    """

    gram: Tensor
    repair: Tensor
    factor: Tensor
    added: float
    shift: Tensor | None = None

    @classmethod
    def of(
        cls,
        parts: list[InputSums],
        weights: Sequence[Tensor],
        damping: float,
        by: Doer | None = None,
        share: Callable[[Tensor, float], float] = gram_rounding.usual_share,
    ) -> Problem:
        """From sums over the samples that are fitted, and over those held out, where there are any.

        Args:
            parts: the sums; the list is emptied and the first of them is changed, as there is room for few.
            weights: the stage's, [N, K] each.
            damping: of H, for rounding.
            by: who does the work; None: this process.
            share: what to add to H's diagonal for a damping.
        """
        doer: Doer = Alone() if by is None or len(parts[0].gram) < _WIDE else by
        chosen = error_compensation.UNSURE if len(parts) == 1 else _chosen(doer, parts[0], parts[1], weights)
        while len(parts) > 1:
            parts[0].add(parts.pop(1))
        sums = parts.pop()
        gram, cross, residual = sums.gram, sums.cross, sums.residual
        shared = doer.share({"gram": gram})
        added, repairing = share(gram, damping), error_compensation.mean_share(gram, chosen)
        lower, reverse = doer.map(factor, [Factor(shared, repairing), Factor(shared, added, reverse=True)])
        shared.release()
        for right in (cross, residual):
            if right is not None:
                _into(right, doer, solved, lower, doer.share({"right": right}))
        lower.release()
        upper = torch.zeros_like(gram)
        _into(upper, doer, inverted, reverse, doer.share({}))
        reverse.release()
        shift = None if residual is None else residual.t().contiguous()
        return cls(error_compensation.raised(gram, added, overwrite=True), cross, upper, added, shift)

    def tensors(self) -> dict[str, Tensor]:
        """What others need of it to round rows."""
        found = {"gram": self.gram, "repair": self.repair, "factor": self.factor}
        return found if self.shift is None else {**found, "shift": self.shift}


@dataclass(frozen=True, eq=False)
class Trial:
    """A damping that is to be tried on the samples held out, shared as the fields of `HeldOut`."""

    damping: float
    held_out: Shared


def try_damping(doer: Any, trial: Trial) -> float:
    """Its error."""
    return error_compensation.HeldOut(**trial.held_out.tensors()).loss(trial.damping)


@dataclass(frozen=True, eq=False)
class Factor:
    """A factor that is wanted of H, shared, with a value added to its diagonal: L, or, in reverse, R."""

    gram: Shared
    added: float
    reverse: bool = False


def factor(doer: Any, wanted: Factor) -> Shared:
    """The factor, shared."""
    matrix = error_compensation.raised(wanted.gram.tensors()["gram"], wanted.added)
    found = cholesky.reversed_factor(matrix) if wanted.reverse else cholesky.run(matrix, overwrite=True)
    shared: Shared = doer.share({"factor": found})
    return shared


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns that are wanted of what a factor solves, for a right side where there is one; both shared."""

    factor: Shared
    right: Shared
    part: slice


def solved(doer: Any, wanted: Columns) -> Shared:
    """Columns of H⁻¹ times the right side."""
    right = wanted.right.tensors()["right"][:, wanted.part]
    shared: Shared = doer.share({"columns": cholesky.solve(wanted.factor.tensors()["factor"], right)})
    return shared


def inverted(doer: Any, wanted: Columns) -> Shared:
    """Columns of U, down to the diagonal."""
    shared: Shared = doer.share({"columns": cholesky.inverse_columns(wanted.factor.tensors()["factor"], wanted.part)})
    return shared


def _chosen(doer: Doer, fitted: InputSums, other: InputSums, weights: Sequence[Tensor]) -> float:
    """The repair's damping."""
    held_out = error_compensation.HeldOut.of(fitted, other, weights)
    shared = doer.share(vars(held_out))

    def losses(dampings: list[float]) -> Iterable[float]:
        return doer.map(try_damping, [Trial(damping, shared) for damping in dampings])

    found = error_compensation.choose(losses)
    shared.release()
    return found


def _into(out: Tensor, doer: Doer, function: Callable[[Any, Columns], Shared], factor: Shared, right: Shared) -> None:
    """Put all columns into a matrix, which may be the right side itself: a column is read for itself alone."""
    parts = cholesky.columns(out.shape[1])
    for part, shared in zip(parts, doer.map(function, [Columns(factor, right, part) for part in parts]), strict=True):
        found = shared.take()["columns"]
        out[: len(found), part] = found
    right.release()
