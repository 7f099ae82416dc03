"""Which scheme each layer gets when all of them share one budget: the multiple-choice knapsack, solved exactly.

    minimize Σ loss[l][c(l)]    subject to    Σ cost[l][c(l)] ≤ budget        one choice c(l) per layer l

Costs are whole numbers: bits (codes, scales and zero points) or nanoseconds.  Dynamic programming over layers: a state
is (cost so far, loss so far); after each layer

    dropped   states that cannot end within the budget
    dropped   states that cost as much as another and lose as much (Pareto)
    dropped   states whose loss, plus the least that the remaining layers can lose with what is left, exceeds the loss
              of a solution already in hand

The last bound is the linear relaxation of the rest: per layer the lower convex hull of its (cost, loss) points, the
hulls' segments of all remaining layers merged by gradient.  It is a piecewise linear function of the budget left, so
one interpolation bounds all states at once.  The solution in hand takes the steepest segments while they fit.  None of
the three drops an optimum, so the answer is exact whatever the units; with the bound, 28·7 layers of 4 choices take
well under a second even where hardly two sums of costs are equal.

Losses are added up as float64, in the order of the layers; two plans closer than that are the same.
Source: auto-round 0.16.1 (auto_scheme: dynamic programming with Pareto pruning); the bound is Pisinger's for MCKP
(European Journal of Operational Research 83, 1995).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import UsageError

_SLACK = 1e-9  # relative: sums of floats in another order differ by less
_ERROR = 1e-12  # of all that can be lost: what a bound that adds and subtracts it may be wrong by


@dataclass(frozen=True)
class Item:
    """A layer, or layers that must get the same choice.

    Args:
        name: for messages.
        losses: what each choice loses, finite, at least 0.
        costs: what each choice costs, whole numbers, at least 0; as many as ``losses``.

    Raises:
        UsageError: no choice, a loss that is no number, or a negative cost.
    """

    name: str
    losses: tuple[float, ...]
    costs: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.losses or len(self.losses) != len(self.costs):
            raise UsageError(f"{self.name}: {len(self.losses)} losses and {len(self.costs)} costs for its choices")
        if not all(math.isfinite(loss) and loss >= 0 for loss in self.losses):
            raise UsageError(f"{self.name}: losses must be finite and not negative, found {list(self.losses)}")
        if any(cost < 0 or cost != int(cost) for cost in self.costs):
            raise UsageError(f"{self.name}: costs must be whole numbers and not negative, found {list(self.costs)}")


def reachable(items: Sequence[Item]) -> tuple[int, int]:
    """The cost of the cheapest and of the most expensive plan."""
    return sum(min(item.costs) for item in items), sum(max(item.costs) for item in items)


def allocate(items: Sequence[Item], budget: int, show: Callable[[int], str] = str) -> tuple[int, ...]:
    """The choice of every item that loses least within the budget; of equal losses the cheaper.

    Args:
        items: layers and their choices.
        budget: most that all of them together may cost.
        show: a cost as text, for the error.

    Returns:
        Index of the choice, by item.

    Raises:
        UsageError: not even the cheapest plan fits; the text gives the reachable range.
    """
    least, most = reachable(items)
    if budget < least:
        raise UsageError(
            f"a budget of {show(budget)} cannot be met; with these choices {show(least)} to {show(most)} can be reached"
        )
    hulls = [_hull(item) for item in items]
    rests = _rests(hulls)
    limit = _greedy(items, hulls, budget) * (1 + _SLACK) + _ERROR * sum(max(item.losses) for item in items)
    costs, losses = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for item, rest in zip(items, rests[1:], strict=True):
        parents, choices = np.divmod(np.arange(len(costs) * len(item.costs)), len(item.costs))
        costs = (costs[:, None] + np.array(item.costs, np.int64)).reshape(-1)
        losses = (losses[:, None] + np.array(item.losses)).reshape(-1)
        kept = np.flatnonzero(losses + rest.least_loss(budget - costs) <= limit)
        order = kept[np.lexsort((losses[kept], costs[kept]))]
        best = np.minimum.accumulate(losses[order])
        kept = order[np.concatenate([[True], losses[order][1:] < best[:-1]])]
        costs, losses = costs[kept], losses[kept]
        trail.append((parents[kept], choices[kept]))
    state = len(costs) - 1  # losses fall strictly with the cost: the last is the least
    chosen = []
    for parents, choices in reversed(trail):
        chosen.append(int(choices[state]))
        state = int(parents[state])
    return tuple(reversed(chosen))


def tie(items: Mapping[str, Item], groups: Sequence[Sequence[str]]) -> list[tuple[Item, tuple[str, ...]]]:
    """Merge items that must get the same choice: their losses and their costs add up.

    Args:
        items: by name; those of one group have the same choices.
        groups: names that belong together; a name that is in none stays alone.

    Returns:
        Items and the names in each, in the order of ``items``.

    Raises:
        UsageError: items of a group have different numbers of choices, or a name is in two groups.
    """
    group_of: dict[str, tuple[str, ...]] = {}
    for group in groups:
        for name in group:
            if name in group_of:
                raise UsageError(f"{name} is tied twice, in {group_of[name]} and in {tuple(group)}")
            group_of[name] = tuple(group)
    merged: dict[tuple[str, ...], Item] = {}
    for name in items:
        names = group_of.get(name, (name,))
        if names in merged:
            continue
        members = [items[member] for member in names]
        if len({len(member.costs) for member in members}) > 1:
            raise UsageError(f"{', '.join(names)} are tied but have different choices")
        losses = tuple(sum(column) for column in zip(*(member.losses for member in members), strict=True))
        costs = tuple(sum(column) for column in zip(*(member.costs for member in members), strict=True))
        merged[names] = Item("+".join(names), losses, costs)
    return [(item, names) for names, item in merged.items()]


def cheapest(items: Sequence[Item], most_loss: float) -> tuple[int, ...]:
    """The choices that cost least while they lose no more than allowed, by halving the budget of :func:`allocate`.

    Args:
        items: layers and their choices.
        most_loss: most that all of them together may lose; where no plan loses so little, the plan that loses least.

    Returns:
        Index of the choice, by item; of a cost within a ten-thousandth of the range of the least one.
    """
    below, above = reachable(items)
    step = max(1, (above - below) // 10_000)
    chosen, least = allocate(items, above), allocate(items, below)
    if _lost(items, least) <= most_loss:
        return least
    while above - below > step:
        middle = (below + above) // 2
        tried = allocate(items, middle)
        if _lost(items, tried) <= most_loss:
            chosen, above = tried, middle
        else:
            below = middle
    return chosen


def _lost(items: Sequence[Item], chosen: Sequence[int]) -> float:
    return sum(item.losses[choice] for item, choice in zip(items, chosen, strict=True))


@dataclass(frozen=True, eq=False)
class _Segments:
    """A convex, falling, piecewise linear function: the least loss by the cost that may be spent."""

    costs: NDArray[np.float64]
    losses: NDArray[np.float64]

    def least_loss(self, budgets: NDArray[np.int64]) -> NDArray[np.float64]:
        """Lower bound of the loss for each budget; infinite when the budget is too small."""
        values = np.interp(budgets, self.costs, self.losses)
        values[budgets < self.costs[0]] = np.inf
        return values


def _hull(item: Item) -> list[tuple[int, float]]:
    """Corners (cost, loss) of the lower convex hull from the cheapest choice to the one that loses least."""
    hull: list[tuple[int, float]] = []
    for cost, loss in sorted(zip(item.costs, item.losses, strict=True)):
        if hull and loss >= hull[-1][1]:
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], (cost, loss)):
            hull.pop()
        hull.append((cost, loss))
    return hull


def _above(a: tuple[int, float], b: tuple[int, float], c: tuple[int, float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def _rests(hulls: Sequence[list[tuple[int, float]]]) -> list[_Segments]:
    """The relaxation of items i, i+1, … for every i, and of none."""
    rests = [_Segments(np.zeros(1), np.zeros(1))]
    least, start = 0.0, 0.0
    segments: list[tuple[float, float]] = []  # (cost, change of loss), the change negative
    for hull in reversed(hulls):
        least, start = least + hull[0][0], start + hull[0][1]
        segments += [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(hull)]
        segments.sort(key=lambda segment: segment[1] / segment[0])
        moves = np.array([(least, start), *segments], np.float64)
        path = np.cumsum(moves, axis=0)
        rests.append(_Segments(path[:, 0], path[:, 1]))
    return rests[::-1]


def _greedy(items: Sequence[Item], hulls: Sequence[list[tuple[int, float]]], budget: int) -> float:
    """Loss of a plan within the budget: from the cheapest one along the steepest segments, as long as they fit."""
    left = budget - sum(min(item.costs) for item in items)
    losses = [hull[0][1] for hull in hulls]
    open_segments = [
        ((b[1] - a[1]) / (b[0] - a[0]), index, corner)
        for index, hull in enumerate(hulls)
        for corner, (a, b) in enumerate(pairwise(hull))
    ]
    blocked: set[int] = set()
    for _, index, corner in sorted(open_segments):
        price = hulls[index][corner + 1][0] - hulls[index][corner][0]
        if index in blocked or price > left:
            blocked.add(index)  # the later segments of this layer start where this one ends
            continue
        left -= price
        losses[index] = hulls[index][corner + 1][1]
    return sum(losses)
