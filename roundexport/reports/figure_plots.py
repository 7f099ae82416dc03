"""Pictures of figures: how values are spread, and what size, loss and speed packages trade."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .numbers import at, numbers, short
from .svg import CHARACTER, LINE, Axis, Drawing, fitting, tick


@dataclass(frozen=True)
class Spread:
    """Counts of values between edges; ``counts`` has one more, below the first and above the last."""

    edges: tuple[float, ...]
    counts: tuple[float, ...]

    @classmethod
    def recorded(cls, record: Any) -> Spread | None:
        """A histogram as `verify` records it; None where it makes no sense."""
        edges, counts = numbers(at(record, "edges")), numbers(at(record, "counts"))
        increasing = all(a < b for a, b in pairwise(edges))
        sound = len(edges) > 1 and len(counts) == len(edges) + 1 and increasing and edges[0] > 0
        return cls(edges, counts) if sound and min(counts) >= 0 and sum(counts) > 0 else None

    @classmethod
    def of(cls, values: Sequence[float], low: float, high: float, bins: int = 48) -> Spread:
        """Of values, in equal steps of their logarithm from ``low`` to ``high``."""
        edges = np.geomspace(low, max(high, low * 1.01), bins)
        counts = np.bincount(np.searchsorted(edges, np.asarray(values), side="right"), minlength=bins + 1)
        return cls(tuple(edges.tolist()), tuple(counts.tolist()))

    def between(self) -> tuple[float, float]:
        """Ends of an axis that holds all counts that are not 0."""
        step = self.edges[1] / self.edges[0]
        full = [self.edges[0] / step, *self.edges, self.edges[-1] * step]
        held = [index for index, count in enumerate(self.counts) if count]
        return full[held[0]], full[held[-1] + 1]


def histogram(
    spread: Spread, width: float, name: str, unit: str, ends: tuple[float, float], marks: Sequence[tuple[str, float]]
) -> Drawing:
    """Bars over a logarithmic axis; the first and the last hold what lies beyond it.

    Args:
        spread: the counts.
        width: px.
        name: what it shows, for those who do not see it.
        unit: of the axis.
        ends: of the axis.
        marks: (word, value) of upright lines.
    """
    height, top = 168.0, 12.0 + LINE * len(marks)
    below = height - 2 * LINE - 8
    across = Axis(*ends, 6.0, width - 6.0, log=True)
    total, most = sum(spread.counts), max(spread.counts)
    told = "; ".join(f"{word} {short(value)}" for word, value in marks)
    drawing = Drawing(width, height, f"{name}: {total:,.0f} values; {told}")
    drawing.bottom(across, below, unit, top, max(3, int(width / 70)))
    full = [ends[0], *spread.edges, ends[1]]
    for index, count in enumerate(spread.counts):
        left, right = across.at(max(full[index], ends[0])), across.at(min(full[index + 1], ends[1]))
        if not count or right <= left:
            continue
        tall = max(1.0, count / most * (below - top))
        tip = f"{tick(full[index])} to {tick(full[index + 1])}: {100 * count / total:.2g} %"
        drawing.box(left, below - tall, max(1.0, right - left - 1), tall, "bar", tip)
    for row, (word, value) in enumerate(sorted(marks, key=lambda mark: -mark[1])):  # no line through a word on its left
        x, y, words = across.at(value), 12.0 + LINE * row, f"{word} {short(value, 3)}"
        drawing.line([(x, y - 8), (x, below)], "mark")
        left = x + 8 + CHARACTER * len(words) > width or (row > 0 and x > 8 + CHARACTER * len(words))
        drawing.text(x + (-5 if left else 5), y, words, "name", "end" if left else "start")
    return drawing


@dataclass(frozen=True)
class Point:
    """A package among others."""

    label: str
    across: float
    loss: float


def frontier(points: Sequence[Point], width: float, unit: str, loss: str, smaller: bool) -> Drawing:
    """Packages by size or speed and by loss; a line joins those that no other beats in both.

    Args:
        points: the packages.
        width: px.
        unit: of the horizontal axis.
        loss: of the vertical axis.
        smaller: less is better across; or more is.
    """
    height, left, top, below = 240.0, 52.0, 26.0, 240.0 - 2 * LINE - 8
    drawing = Drawing(width, height, f"{loss} against {unit}: " + "; ".join(_said(p) for p in points))
    across = Axis.over([p.across for p in points], left + 4, width - 6)
    wide = all(p.loss > 0 for p in points) and max(p.loss for p in points) > 5 * min(p.loss for p in points)
    upward = Axis.over([p.loss for p in points], below, top, log=wide)
    drawing.text(0, 12, f"↑ {loss}", "soft")
    drawing.side(upward, left, width - 6, 5)
    drawing.bottom(across, below, f"{unit} →", top, max(3, int(width / 80)))
    best = [p for p in points if not any(_beats(other, p, smaller) for other in points)]
    drawing.line([(across.at(p.across), upward.at(p.loss)) for p in sorted(best, key=lambda p: p.across)], "front")
    taken: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: p.loss):
        x, y = across.at(point.across), upward.at(point.loss)
        drawing.dot(x, y, 5, "after-dot" if point in best else "before-dot", _said(point))
        down = y - 9
        while any(math.hypot((x - a) / 6, down - b) < LINE - 2 for a, b in taken) and down > 12:
            down -= LINE
        taken.append((x, down))
        end = x > 0.6 * width
        drawing.text(
            x + (6 if end else -6), down, fitting(point.label, 0.55 * width), "name", "end" if end else "start"
        )
    return drawing


def _beats(one: Point, other: Point, smaller: bool) -> bool:
    gain = (other.across - one.across) * (1 if smaller else -1)
    return gain >= 0 and one.loss <= other.loss and (gain > 0 or one.loss < other.loss)


def _said(point: Point) -> str:
    return f"{point.label}: {short(point.across)}, {short(point.loss)}"
