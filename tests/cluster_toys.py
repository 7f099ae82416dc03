"""Workers without processes: places inside this process, each with a block open of its own, which die when told to."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tuning_tools import contents

from roundexport import TuneSettings
from roundexport.cluster import block_parts
from roundexport.cluster.messages import answer
from roundexport.cluster.opening import Cluster
from roundexport.cluster.pool import Pool
from roundexport.cluster.workers import Workers
from roundexport.tuning import run


class Died(Exception):  # noqa: N818  (what a pool raises is its own)
    """A place's process is gone."""


class InlinePool:
    """Places that answer at once, in this process.

    Args:
        places: how many.
        dies: told the number of each message, from 0; whether its process dies before it answers.
    """

    died: tuple[type[BaseException], ...] = (Died,)

    def __init__(self, places: int, dies: Callable[[int], bool] = lambda number: False) -> None:
        self.places, self._dies = places, dies
        self._here = [block_parts._Here() for _ in range(places)]
        self.messages, self.restarts = 0, 0
        self.by_place = [0] * places

    def submit(self, place: int, message: bytes) -> Future[bytes]:
        future: Future[bytes] = Future()
        number, self.messages = self.messages, self.messages + 1
        if self._dies(number):
            future.set_exception(Died(f"place {place}"))
            return future
        self.by_place[place] += 1
        kept, block_parts._here = block_parts._here, self._here[place]
        try:
            future.set_result(answer(message))
        finally:
            block_parts._here = kept
        return future

    def restart(self, place: int) -> None:
        self._here[place] = block_parts._Here()
        self.restarts += 1

    def close(self) -> None:
        pass

    def describe(self) -> str:
        return f"{self.places} places"


SMALL: dict[str, Any] = {
    "algorithm": "gram", "group_size": 32, "num_samples": 20, "sample_len": 16, "batch_size": 4, "precision": "float32",
}  # fmt: skip


def shared(
    model: str | Path, out: Path, text: Path, pool: Pool | None, store: str | None = None, **changes: Any
) -> dict[str, bytes]:
    """The files of an artifact, tuned by the places of a pool, through a store where one is named; None: plainly."""
    settings = TuneSettings(**{**SMALL, "calibration": str(text), **changes})
    workers = None if pool is None else Cluster(Workers(pool), store)
    return contents(run.tune(model, out, settings, writer=None, workers=workers, progress=False))
