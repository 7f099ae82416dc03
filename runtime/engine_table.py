"""What was measured of engines against each other, and which of them ``auto`` takes.

A package opens with the engines of its target.  One of them has sessions, so it can do everything; the others are
vendors' own loops, which write one answer at a time and choose its tokens themselves.  So there is one thing to choose:
who writes a single greedy answer.  A vendor's loop does where it was measured to be faster,

    ratio = time of an answer with sessions / time of the same answer in the vendor's loop       (paired, one per round)
    taken:  the 95 % bootstrap interval of the median ratio lies above 1

and everything else (several answers, a draft, sampling, penalties, log-probabilities, a grammar, float32 throughout,
another device) goes to the engine with sessions.  Sampling too: with the same seed a vendor draws other tokens, and a
text must not change because something was timed.

Rows are read from the user's file first (``roundexport bench PACKAGE --engine auto`` writes it, aside and renamed),
then from the one that is shipped.  A row speaks for one list of instruction sets and for exact versions of both
libraries; elsewhere it is as if it were not there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from roundexport.environment.versions import installed_versions
from roundexport.errors import ArtifactError, UsageError
from roundexport.storage.atomic import make_parents, replace_file
from roundexport.storage.strict_json import decode, encode, parse_format
from roundexport.storage.user_cache import cache_root
from roundexport.types import Task

from .machine import instruction_sets
from .settings import GenerationSettings
from .types import EngineChoice
from .vendor_loop import beyond_plain

FORMAT: Literal["roundexport-engines/1"] = "roundexport-engines/1"
SHIPPED = Path(__file__).with_name("engine_table.json")
LEAST_ROUNDS = 5
"""Rounds below which an interval means nothing, so that no row is made."""


@dataclass(frozen=True)
class Measured:
    """A vendor's loop against the engine with sessions, answering one prompt.

    Args:
        target: whose packages.
        task: what they do.
        batch: prompts answered together.
        engine: the vendor's loop.
        ratio: median of the paired ratios of times; above 1 the vendor's loop is faster.
        low: lower end of its 95 % interval.
        high: upper end.
        rounds: ratios that it is the median of.
        measured_on: packages, shapes and threads, in words.
        instruction_sets: of the machine.
        versions: of both engines' libraries.
    """

    target: str
    task: Task
    batch: int
    engine: str
    ratio: float
    low: float
    high: float
    rounds: int
    measured_on: str
    instruction_sets: tuple[str, ...]
    versions: dict[str, str]

    def __str__(self) -> str:
        return f"{self.ratio:.2f} ({self.low:.2f}–{self.high:.2f}) times as fast on {self.measured_on}"


@dataclass(frozen=True)
class Table:
    """Rows, each for its own machine and versions."""

    rows: tuple[Measured, ...] = ()
    format: Literal["roundexport-engines/1"] = FORMAT


def user_table() -> Path:
    """The file that the user's own measurements are in; it need not exist."""
    return cache_root() / "engines.json"


def read_table(path: Path) -> Table:
    """The rows of a file; none where it is missing, or not one of these."""
    try:
        return decode(Table, parse_format(path.read_bytes(), FORMAT, str(path)), str(path))
    except (OSError, ArtifactError):
        return Table()


def keep(rows: Sequence[Measured], path: Path | None = None) -> Path:
    """Put rows into a file, in the place of older ones for the same engine, machine and versions.

    Args:
        rows: what was measured.
        path: the file; None: the user's.

    Returns:
        The file.

    Raises:
        UsageError: it cannot be written.
        WontFitError: the disk is full.
    """
    path = path or user_table()
    new = {_key(row): row for row in rows}
    old = {_key(row): row for row in read_table(path).rows}
    make_parents(path.parent)
    replace_file(path, encode(Table(tuple((old | new).values()))))
    return path


def _key(row: Measured) -> tuple[object, ...]:
    return row.target, row.task, row.batch, row.engine, row.instruction_sets, tuple(sorted(row.versions.items()))


def versions_of(*modules: ModuleType) -> dict[str, str]:
    """Versions of engines' libraries, of those that are installed."""
    return installed_versions(module.LIBRARY.replace("_", "-") for module in modules)


def choose(
    target: str,
    task: Task,
    engines: Mapping[str, ModuleType],
    request: GenerationSettings | None,
) -> EngineChoice:
    """The engine for packages of a target.

    Args:
        target: of the package.
        task: of the package.
        engines: those of the target, by name; one of them has sessions.
        request: how single prompts are to be answered, if nothing else will be asked for; None: anything may be.

    Raises:
        UsageError: none of them has sessions.
    """
    vendors = {name: module for name, module in engines.items() if is_vendors(module)}
    ours = next((name for name in engines if name not in vendors), None)
    if ours is None:
        raise UsageError(f"no engine with sessions opens packages for {target}")
    if task != "generate" or not vendors:
        return EngineChoice(ours, f"the only engine here for packages like this one, for {target}")
    found = {name: measured(target, task, engines[ours], module, name) for name, module in vendors.items()}
    faster = max((row for row in found.values() if row and row.low > 1), key=lambda row: row.ratio, default=None)
    known = "; ".join(f"{row.engine} was measured {row}" for row in found.values() if row)
    if faster is None:
        return EngineChoice(ours, f"no vendor's loop is known to be faster here: {known or _unmeasured(vendors)}")
    if request is None:
        return EngineChoice(ours, f"it has sessions, and anything may be asked for; for single greedy answers {known}")
    if beyond := beyond_plain(request):
        return EngineChoice(ours, f"it does all that was asked for ({', '.join(beyond)}); for plain answers {known}")
    return EngineChoice(faster.engine, f"measured {faster}, as its vendor's loop against {ours}")


def measured(target: str, task: Task, ours: ModuleType, vendor: ModuleType, engine: str) -> Measured | None:
    """The row for one prompt at a time, of the user's or the shipped file, that speaks for this machine."""
    versions, sets = versions_of(ours, vendor), instruction_sets()
    if len(versions) < 2 or importlib.util.find_spec(vendor.LIBRARY) is None:
        return None
    wanted = (target, task, 1, engine, sets, tuple(sorted(versions.items())))
    rows = (row for path in (user_table(), SHIPPED) for row in read_table(path).rows)
    return next((row for row in rows if _key(row) == wanted), None)


def is_vendors(module: ModuleType) -> bool:
    """Whether an engine is a vendor's own loop."""
    return bool(getattr(module, "VENDOR", False))


def _unmeasured(vendors: Mapping[str, ModuleType]) -> str:
    here = [name for name, module in vendors.items() if importlib.util.find_spec(module.LIBRARY) is not None]
    if not here:
        return f"{', '.join(vendors)} is not installed"
    return (
        f"{', '.join(here)} was not measured on {' '.join(instruction_sets()) or 'this processor'} in these versions "
        "(roundexport bench PACKAGE --engine auto measures)"
    )
