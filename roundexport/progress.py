"""What a person sees while something runs: what is being done, how far it is, how long it has taken and will take.

    with Progress() as shown:
        with shown.stage("scoring the float model", seconds=12) as stage:     seconds: an estimate, where there is one
            stage.at(0.4, "model.layers.3")

    on a terminal   a bar per stage, kept moving by rich; below 64 columns a line with its figures and name instead
    elsewhere       a line when a stage begins and ends, and one at least every `INTERVAL` seconds in between, from a
                    thread of its own, so that work which reports nothing is not silent either:

        scoring the float model: 40 %, 5 s, about 7 s left (model.layers.3)

Everything goes to stderr, the one there was when the report was made: work that hides what a library prints, by
putting another in its place, hides none of these lines.  stdout belongs to results.  The time left is extrapolated
from the share that is done, or taken from the estimate until there is one.  A thread can only speak while the work
lets go of the interpreter's lock; torch, numba kernels and both runtimes do.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text

INTERVAL = 7.0
"""Seconds after which a line is due: under ten even where the thread is woken late."""
_SHORT = 1.0  # seconds below which the end of a stage is not worth a line
_NARROW = 64  # columns below which a bar leaves no room for words
_BAR = 16
_LEAST_SHARE = 0.02  # below it, the time left is not extrapolated


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def passed(seconds: float) -> str:
    """A time that has passed, in words; unlike an estimate it moves from line to line."""
    minutes, rest = divmod(int(seconds), 60)
    return duration(seconds) if seconds < 90 or seconds >= 5400 else f"{minutes} min {rest} s"


class Stage:
    """One thing that is being done; made by :meth:`Progress.stage` or :meth:`Progress.begin`.

    Attributes:
        name: what is being done.
        share: how much of it is done, 0 to 1; None as long as nothing was reported.
        detail: where it is.
    """

    def __init__(self, name: str, seconds: float | None, clock: Callable[[], float]) -> None:
        self.name, self.seconds, self.detail = name, seconds, ""
        self.share: float | None = None
        self._clock, self._since = clock, clock()
        self._first: tuple[float, float] | None = None  # when it was first said how much is done, and how much

    def at(self, share: float, detail: str | None = None) -> None:
        """Say how much is done, from 0 to 1, and where the work is."""
        self.share = min(max(share, 0.0), 1.0)
        if self._first is None and share > 0:
            self._first = (self._clock(), self.share)
        if detail is not None:
            self.detail = detail

    def doing(self, detail: str) -> None:
        """Say where the work is, of which nobody knows the share."""
        self.detail = detail

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return self._clock() - self._since

    @property
    def left(self) -> float | None:
        """Seconds that it will take from here; None where nothing is known."""
        elapsed = self.elapsed
        if self.share is not None and self.share >= _LEAST_SHARE and elapsed > _SHORT:
            begun, done = self._first or (self._since, 0.0)
            if self.share > done:  # what came before the first report was getting ready
                return (self._clock() - begun) * (1 - self.share) / (self.share - done)
            return elapsed * (1 - self.share) / self.share
        return None if self.seconds is None else max(0.0, self.seconds - elapsed)

    def describe(self) -> str:
        """The stage in one line."""
        return f"{self.name}: {self.figures()}{f' ({self.detail})' if self.detail else ''}"

    def figures(self) -> str:
        """How far it is, how long it has taken and will take."""
        share = [] if self.share is None else [f"{self.share:.0%}".replace("%", " %")]
        left = [] if self.left is None else [f"about {duration(self.left)} left"]
        return ", ".join([*share, passed(self.elapsed), *left])


class Progress:
    """Reports on stderr; a context, within which stages may be nested.

    Args:
        enabled: False says nothing at all.
        interval: seconds between lines where there is no terminal.
        clock: seconds, for tests.
    """

    def __init__(
        self, enabled: bool = True, interval: float = INTERVAL, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._enabled, self._interval, self._clock = enabled, interval, clock
        self._console = Console(file=sys.stderr, quiet=not enabled, highlight=False, soft_wrap=True)
        self._terminal = enabled and sys.stderr.isatty()
        self._narrow = self._console.width < _NARROW
        self._bar = Bar(*_columns(self._narrow), console=self._console, disable=not self._terminal, transient=True)
        self._stages: list[Stage] = []
        self._bars: dict[int, TaskID] = {}
        self._said, self._depth = clock(), 0
        self._lock, self._stop = threading.RLock(), threading.Event()
        self._ticker: threading.Thread | None = None

    @classmethod
    def of(cls, shown: bool | Progress) -> Progress:
        """The one that is given, or a new one that reports or not."""
        return shown if isinstance(shown, Progress) else cls(shown)

    def __enter__(self) -> Progress:
        self._depth += 1
        if self._depth == 1 and self._enabled:
            if self._terminal:  # off a terminal some versions of rich end a bar that was never shown with an empty line
                self._bar.start()
            self._stop.clear()
            self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
            self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth or self._ticker is None:
            return
        self._stop.set()
        self._ticker.join()
        self._ticker = None
        while self._stages:
            self._drop(self._stages[-1])
        if self._terminal:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        with self._lock:
            self._console.print(text, markup=False, soft_wrap=not self._terminal)  # a terminal breaks inside of words
            self._said = self._clock()

    def table(self, rows: Sequence[dict[str, Any]]) -> None:
        """Print rows of the same columns."""
        if not rows:
            return
        table = Table(*(Column(name, overflow="fold") for name in rows[0]), box=None)
        for row in rows:
            cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
            table.add_row(*(Text(cell) for cell in cells))
        with self._lock:
            self._console.print(table)
            self._said = self._clock()

    @contextmanager
    def stage(self, name: str, seconds: float | None = None) -> Iterator[Stage]:
        """While something is done.

        Args:
            name: what, in a few words.
            seconds: how long it is expected to take.
        """
        stage = self.begin(name, seconds)
        try:
            yield stage
        except BaseException:
            self._drop(stage)
            raise
        self.end(stage)

    def begin(self, name: str, seconds: float | None = None) -> Stage:
        """Begin a stage that :meth:`end` ends, or the end of the context."""
        stage = Stage(name, seconds, self._clock)
        with self._lock:
            self._stages.append(stage)
            if self._terminal:
                self._bars[id(stage)] = self._bar.add_task(name, total=None, line=stage.figures())
            else:
                self.say(f"{name} …" if seconds is None else f"{name} … about {duration(seconds)}")
        return stage

    def end(self, stage: Stage) -> None:
        """End a stage; one that took a moment is said with its time."""
        if stage in self._stages:
            took = stage.elapsed
            self._drop(stage)
            if took >= _SHORT:
                self.say(f"{stage.name}: {took:.1f} s")

    def _drop(self, stage: Stage) -> None:
        with self._lock:
            if stage in self._stages:
                self._stages.remove(stage)
            if id(stage) in self._bars:
                self._bar.remove_task(self._bars.pop(id(stage)))

    def _tick(self) -> None:
        pause = 0.25 if self._terminal else min(0.5, self._interval / 4)
        while not self._stop.wait(pause):
            self.tick()

    def tick(self) -> None:
        """Bring what is shown up to date: the bars, or a line where one is due."""
        with self._lock:
            if self._terminal:
                for stage in self._stages:
                    share = stage.share
                    self._bar.update(
                        self._bars[id(stage)], total=None if share is None else 1.0, completed=share or 0.0,
                        line=stage.figures() if self._narrow else stage.describe().removeprefix(f"{stage.name}: "),
                    )  # fmt: skip
            elif self._stages and self._clock() - self._said >= self._interval:
                self.say(self._stages[-1].describe())


def _columns(narrow: bool) -> list[ProgressColumn]:
    """Name, bar and figures of a stage; on a narrow terminal the figures first, as what is cut off is at the end."""
    if narrow:
        return [TextColumn("{task.fields[line]} · {task.description}", markup=False)]
    return [
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=_BAR),
        TextColumn("{task.fields[line]}", markup=False),
    ]  # fmt: skip
