"""Benchmark records (``roundexport bench --json``) as timings, each with the package that it is about."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from roundexport.errors import UsageError

from .numbers import at, number, numbers
from .records import Timing

_LONGEST = 256 << 20


def read_timings(paths: Sequence[Path]) -> tuple[Timing, ...]:
    """All timings of some benchmark records.

    Raises:
        UsageError: a file cannot be read, or is not a record of `bench --json`.
    """
    return tuple(timing for path in paths for timing in _timings(path))


def _timings(path: Path) -> list[Timing]:
    how = "make it with `roundexport bench PACKAGE --json > bench.json`"
    try:
        if path.stat().st_size > _LONGEST:
            raise UsageError(f"--bench {path}: more than {_LONGEST >> 20} MiB; {how}")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--bench {path} cannot be read: {error.strerror}; {how}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--bench {path} is not JSON ({error}); {how}") from error
    rows, contestants, runs = (at(found, key) for key in ("rows", "contestants", "runs"))
    if not all(isinstance(part, list) for part in (rows, contestants, runs)):
        raise UsageError(f"--bench {path} is not a record of bench: it lacks rows, contestants or runs; {how}")
    opened = {str(at(entry, "name")): entry for entry in contestants if isinstance(entry, Mapping)}
    return [_timing(row, opened, runs, found) for row in rows if isinstance(row, Mapping)]


def _timing(row: Mapping[str, Any], opened: Mapping[str, Any], runs: Sequence[Any], found: Any) -> Timing:
    name = str(row.get("contestant"))
    shape = {key: row[key] for key in ("prompt_len", "output_len", "text_len", "batch_size") if key in row}
    own = [run for run in runs if at(run, "contestant") == name and at(run, "shape") == shape]
    gaps = [gap for run in own for gap in numbers(at(run, "step_ms"))]
    if not gaps:
        gaps = [value for run in own if (value := number(at(run, "metrics", "latency_ms"))) is not None]
    info = at(opened.get(name), "info")
    info = info if isinstance(info, Mapping) else {}
    package = info.get("package")
    parts = [part for part in (at(found, "machine"), at(found, "settings"))]
    machine, settings = (part if isinstance(part, Mapping) else {} for part in parts)
    engine = str(info.get("engine", info.get("library", "")))
    return Timing(
        name, package if isinstance(package, str) else None, engine, shape, row, tuple(gaps), machine, settings, info
    )
