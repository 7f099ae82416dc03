"""Drawings as SVG text: axes, marks and words, in the colors of the page they stand in.

A drawing is as wide as it is shown, so that words have the size they are written in, on a phone too; a page that has
room shows another, wider drawing of the same.  Colors are classes (page_style.py), so that light and dark need no
second copy.  No library: the drawings of samples/model at 4 bits, losses and KL recorded, are 19 KiB here, 92 as
matplotlib's SVG in one width and one set of colors, and with plotly a file holds its script of 4,700 KiB:

    python samples/report_plot_sizes.py PACKAGE…
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape

CHARACTER = 7.2  # px of a character at the drawings' type size, in a wide face
LINE = 15.0  # px from line to line


@dataclass(frozen=True)
class Axis:
    """Values to pixels.

    Args:
        low: value at ``start``.
        high: value at ``end``.
        start: pixel.
        end: pixel.
        log: logarithmic.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float, log: bool = False) -> Axis:
        """An axis with room for all values; on a logarithmic one, those that are not positive do not count."""
        known = [value for value in values if not log or value > 0] or [1.0]
        low, high = min(known), max(known)
        if log:
            margin = max(0.06 * math.log(high / low), 0.1)
            return cls(low / math.exp(margin), high * math.exp(margin), start, end, True)
        margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(low - margin, high + margin, start, end)

    def at(self, value: float) -> float:
        """The pixel of a value; one beyond the axis lies on its end."""
        low, high, value = (
            (math.log(self.low), math.log(self.high), math.log(max(value, self.low)))
            if self.log
            else (self.low, self.high, value)
        )
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values on the axis, not more than ``most``."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for digits in ((1, 2, 5), (1, 3), (1,)):
                found = [d * 10.0**e for e in range(first, last + 1) for d in digits]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) <= most:
                    return found
            return found[:: -(-len(found) // most)]
        step = 10 ** math.floor(math.log10((self.high - self.low) / most))
        step *= next(m for m in (1, 2, 5, 10) if (self.high - self.low) / (m * step) <= most)
        count = range(math.ceil(self.low / step), math.floor(self.high / step) + 1)
        return [round(index * step, 12) for index in count]


def tick(value: float) -> str:
    """A tick's label."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:,.6g}"
    digits, exponent = f"{value:.0e}".split("e")
    power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{power}" if digits == "1" else f"{digits}·10{power}"


@dataclass
class Drawing:
    """One drawing, filled mark by mark.

    Args:
        width: px.
        height: px.
        says: what it shows, for those who do not see it.
    """

    width: float
    height: float
    says: str
    parts: list[str] = field(default_factory=list)

    def line(self, points: Iterable[tuple[float, float]], style: str) -> None:
        """A line through points."""
        path = " ".join(f"{_px(x)},{_px(y)}" for x, y in points)
        self.parts.append(f'<polyline class="{style}" points="{path}"/>')

    def box(self, x: float, y: float, width: float, height: float, style: str, tip: str = "") -> None:
        """A filled rectangle; ``tip`` appears under the pointer."""
        inside = f"><title>{escape(tip)}</title></rect>" if tip else "/>"
        sides = f'x="{_px(x)}" y="{_px(y)}" width="{_px(width)}" height="{_px(height)}"'
        self.parts.append(f'<rect class="{style}" {sides}{inside}')

    def dot(self, x: float, y: float, radius: float, style: str, tip: str = "") -> None:
        """A filled circle."""
        inside = f"><title>{escape(tip)}</title></circle>" if tip else "/>"
        self.parts.append(f'<circle class="{style}" cx="{_px(x)}" cy="{_px(y)}" r="{_px(radius)}"{inside}')

    def text(self, x: float, y: float, words: str, style: str = "", anchor: str = "") -> None:
        """Words; ``anchor`` is start, middle or end."""
        styled = f' class="{style}"' if style else ""
        turned = f' text-anchor="{anchor}"' if anchor else ""
        self.parts.append(f'<text x="{_px(x)}" y="{_px(y)}"{styled}{turned}>{escape(words)}</text>')

    def bottom(self, axis: Axis, y: float, name: str, top: float, most: int = 5) -> None:
        """A horizontal axis with its grid lines, and its name below."""
        for value in axis.ticks(most):
            x = axis.at(value)
            self.line([(x, top), (x, y)], "grid")
            self.text(x, y + LINE, tick(value), "soft", "middle")
        self.line([(axis.start, y), (axis.end, y)], "axis")
        self.text((axis.start + axis.end) / 2, y + 2 * LINE + 2, name, "soft", "middle")

    def side(self, axis: Axis, x: float, right: float, most: int = 4) -> None:
        """A vertical axis with its grid lines."""
        for value in axis.ticks(most):
            y = axis.at(value)
            self.line([(x, y), (right, y)], "grid")
            self.text(x - 5, y + 4, tick(value), "soft", "end")

    def svg(self) -> str:
        """The drawing as text."""
        size = f'width="{_px(self.width)}" height="{_px(self.height)}"'
        box = f'viewBox="0 0 {_px(self.width)} {_px(self.height)}"'
        return f'<svg {size} {box} role="img" aria-label="{escape(self.says)}">{"".join(self.parts)}</svg>'


def fitting(words: str, width: float) -> str:
    """Words, cut at their start where they are wider than so many px."""
    most = max(2, int(width / CHARACTER))
    return words if len(words) <= most else "…" + words[-(most - 1) :]


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
