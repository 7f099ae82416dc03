"""Numbers as records of others hold them, and as a person reads them.

Records are JSON that anybody may have written: a figure that is not a finite number counts as absent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

Pairs = list[tuple[str, str]]
"""(what, value) as they are shown one under the other."""


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def numbers(values: Any) -> tuple[float, ...]:
    """The finite numbers of a list."""
    found = map(number, values) if isinstance(values, list | tuple) else iter(())
    return tuple(value for value in found if value is not None)


def at(record: Any, *keys: str) -> Any:
    """What lies under keys, one inside the other; None where a level is missing."""
    for key in keys:
        if not isinstance(record, Mapping):
            return None
        record = record.get(key)
    return record


def short(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits; a dash for none."""
    if value is None:
        return "–"
    if value != 0 and not 1e-4 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e")
    text = f"{value:.{digits}g}" if abs(value) < 10 ** (digits - 1) else f"{value:,.0f}"
    return text


def percent(value: float | None) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{100 * value:.1f} %"


def spread(record: Any, factor: float = 1.0, unit: str = "") -> str:
    """``{mean, stderr}`` of a record as mean ± standard error, both to the error's second digit.

    Args:
        record: the figure.
        factor: what it is multiplied with.
        unit: what follows.
    """
    mean, error = number(at(record, "mean")), number(at(record, "stderr"))
    if mean is None:
        return "–"
    mean, error = factor * mean, None if error is None else factor * error
    if not error or not 1e-8 < error < 1e6:
        return f"{short(mean)}{unit}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{mean:.{digits}f} ± {error:.{digits}f}{unit}"


def mebibytes(count: int) -> str:
    """A size in bytes."""
    return f"{count / 2**20:.1f} MiB"


def flat(settings: Mapping[str, Any]) -> str:
    """Settings in one line; what is nested or None is left out."""
    shown = ((name, value) for name, value in settings.items() if isinstance(value, str | int | float | bool))
    return ", ".join(f"{name} {short(value) if isinstance(value, float) else value}" for name, value in shown)


def joined(parts: Iterable[str | None]) -> str:
    """The parts that are there, with commas."""
    return ", ".join(part for part in parts if part)
