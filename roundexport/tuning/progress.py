"""What a tuning run tells its user, on stderr: what will be done, a bar with the time left, a line per finished block.

    model.layers.2   loss 0.0123 → 0.0051   41 s   peak 1.2 GiB

What it will take is estimated in cost_model.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text

from .cost_model import peak_bytes


class Progress:
    """Reports on stderr; says nothing when not ``enabled``."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._console = Console(stderr=True, quiet=not enabled, highlight=False)
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False),
            console=self._console, disable=not enabled or not sys.stderr.isatty(), transient=True,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._done = 0
        self._since = time.monotonic()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False)

    def table(self, rows: Sequence[dict[str, Any]]) -> None:
        """Print rows of the same columns."""
        if rows:
            table = Table(*(Column(name, overflow="fold") for name in rows[0]), box=None)
            for row in rows:
                cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
                table.add_row(*(Text(cell) for cell in cells))
            self._console.print(table)

    def begin(self, blocks: int, done: int) -> None:
        """Start the bar: ``blocks`` in all, ``done`` of them in an earlier run."""
        self._done = done
        self._task = self._bar.add_task("tuning", total=blocks - done)

    @contextmanager
    def block(self, name: str) -> Iterator[Callable[[float], None]]:
        """While a block is tuned; yields what takes the share of it that is done."""
        self._since = time.monotonic()
        finished = self._bar.tasks[0].completed if self._bar.tasks else 0

        def report(share: float) -> None:
            if self._task is not None:
                self._bar.update(self._task, completed=finished + share, description=name)

        yield report
        report(1.0)

    @contextmanager
    def whole(self, name: str) -> Iterator[Callable[[float], None]]:
        """While all blocks are worked on at once, before the bar of the blocks starts; yields the same."""
        self._since = time.monotonic()
        task = self._bar.add_task(name, total=1)
        try:
            yield lambda share: self._bar.update(task, completed=share)
        finally:
            self._bar.remove_task(task)

    def block_done(self, name: str, before: float | None, after: float | None) -> None:
        """Print a finished block's line."""
        loss = "" if before is None or after is None else f"   loss {before:.4g} → {after:.4g}"
        self.say(f"{name}{loss}   {time.monotonic() - self._since:.1f} s   peak {peak_bytes() / 2**30:.2f} GiB")
