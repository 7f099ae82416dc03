"""What a tuning run tells its user: what will be done, how far the blocks are, a line per finished block.

    model.layers.2   loss 0.0123 → 0.0051   41 s   peak 1.2 GiB

Bars, lines and times left are those of `roundexport/progress.py`; what a run will take is estimated in cost_model.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from roundexport.progress import Progress as Shown
from roundexport.progress import Stage

from .cost_model import peak_bytes


class Progress:
    """A tuning run's part of what is shown; says nothing when not ``shown``.

    Args:
        shown: where a longer piece of work reports already, or whether to report at all.
    """

    def __init__(self, shown: bool | Shown) -> None:
        self._shown = Shown.of(shown)
        self._stage: Stage | None = None
        self._blocks = self._finished = 0
        self._since = time.monotonic()
        self.say, self.table = self._shown.say, self._shown.table

    @property
    def shown(self) -> Shown:
        """Where all this is shown, for what reports there itself."""
        return self._shown

    def __enter__(self) -> Progress:
        self._shown.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stage is not None:
            self._shown.end(self._stage)
        self._shown.__exit__(kind, error, trace)

    @contextmanager
    def stage(self, name: str, seconds: float | None = None) -> Iterator[Stage]:
        """While something else than blocks is done."""
        with self._shown.stage(name, seconds) as stage:
            yield stage

    def begin(self, blocks: int, done: int) -> None:
        """Start the bar: ``blocks`` in all, ``done`` of them in an earlier run."""
        self._blocks, self._finished = blocks - done, 0
        self._stage = self._shown.begin("blocks")

    @contextmanager
    def block(self, name: str) -> Iterator[Callable[[float], None]]:
        """While a block is tuned, or what follows the blocks; yields what takes the share of it that is done."""
        if self._finished >= self._blocks:
            with self.whole(name) as report:
                yield report
            return
        self._since = time.monotonic()

        def at(share: float) -> None:
            if self._stage is not None:
                self._stage.at((self._finished + share) / self._blocks, name)

        yield at
        self._finished += 1
        at(0.0)

    @contextmanager
    def whole(self, name: str) -> Iterator[Callable[[float], None]]:
        """While all blocks are worked on at once; yields the same."""
        self._since = time.monotonic()
        with self._shown.stage(name) as stage:
            yield stage.at

    def block_done(self, name: str, before: float | None, after: float | None, note: str = "") -> None:
        """Print a finished block's line, and what must be told of it."""
        loss = "" if before is None or after is None else f"   loss {before:.4g} → {after:.4g}"
        self.say(f"{name}{loss}   {time.monotonic() - self._since:.1f} s   peak {peak_bytes() / 2**30:.2f} GiB")
        if note:
            self.say(f"{name}: {note}")
        if self._finished == self._blocks and self._stage is not None:
            self._shown.end(self._stage)
            self._stage = None
