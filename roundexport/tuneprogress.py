"""What a tuning run tells its user, on stderr: an estimate first, a bar with the time left, a line per finished block.

    model.layers.2   loss 0.0123 → 0.0051   41 s   peak 1.2 GiB

The estimate times one batch through the first block; memory is what the process holds by then, plus the hidden states
that are still to come, plus for the largest part of a step: nine float32 copies of the block's weights and the
activations kept for the backward pass.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from types import TracebackType
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor, nn

from .blocks import BlockCall, linears, weight_of

_WEIGHT_COPIES = 9  # weight, V twice, gradient, ŵ, steps before and after the clamp, two temporaries
_KEPT_PER_OUTPUT = 3  # float32 values that autograd and the next operations keep per output of a linear


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

    def block_done(self, name: str, before: float | None, after: float | None) -> None:
        """Print a finished block's line."""
        loss = "" if before is None or after is None else f"   loss {before:.4g} → {after:.4g}"
        self.say(f"{name}{loss}   {time.monotonic() - self._since:.1f} s   peak {_peak_bytes() / 2**30:.2f} GiB")


def estimate(
    block: nn.Module, call: BlockCall, hidden: Tensor, batch_size: int, device: torch.device, forwards: float
) -> str:
    """Time and memory that tuning will take, in words.

    Args:
        block: a block, on ``device``.
        call: how it is called.
        hidden: hidden states [samples, length, H].
        batch_size: samples per step.
        device: where it runs.
        forwards: forwards of one sample through a block that are to come.
    """
    batch = hidden[:batch_size].to(device)
    with torch.no_grad():
        call.run(block, batch)  # the first run pays for thread pools and memory
        seconds = median(_timed(lambda: call.run(block, batch)) for _ in range(3)) / len(batch) * forwards
    weights = [weight_of(module) for module in linears(block).values()]
    tokens = len(batch) * hidden.shape[1]
    step = _WEIGHT_COPIES * sum(w.numel() for w in weights) + _KEPT_PER_OUTPUT * tokens * sum(len(w) for w in weights)
    memory = psutil.Process().memory_info().rss + 4 * (2 * hidden.numel() + step)
    return f"about {_duration(seconds)} and {memory / 2**30:.1f} GiB"


def _timed(work: Callable[[], object]) -> float:
    since = time.monotonic()
    work()
    return time.monotonic() - since


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
