"""When requests come: users who wait for their answers (a closed loop), or strangers who do not (an open one).

    closed, N users   each sends its next request when its answer has ended: N are always under way
    open, rate λ      request k is due at t_k = Σ_{i≤k} e_i with e_i ~ Exp(λ), whatever the server does (Poisson)

A closed loop asks how much a server can do, and slows down with it; an open one asks how long somebody waits at a
given demand.  In the open loop latencies count from the moment a request was *due*, so that one which the client or the
server held back is not told as quick (coordinated omission: Tene, "How NOT to Measure Latency", 2013).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np

from roundexport.errors import UsageError

from .stream_client import BUSY, Sample

Ask = Callable[[int, float], Awaitable[Sample]]  # number of the request, and when it was due
_LONGEST_WAIT_S = 5.0  # of a user who was told to come again


@dataclass(frozen=True)
class Level:
    """One demand.

    Args:
        users: of a closed loop; None for an open one.
        rate: requests per second of an open loop; None for a closed one.

    Raises:
        UsageError: neither or both are given, or one makes no sense.
    """

    users: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        if (self.users is None) == (self.rate is None):
            raise UsageError("a level has a number of users or a rate of arrivals")
        if self.users is not None and not 1 <= self.users <= 4096:
            raise UsageError(f"concurrency must be from 1 to 4096 users, not {self.users}")
        if self.rate is not None and not 0 < self.rate <= 10000:
            raise UsageError(f"a rate must be above 0 and at most 10000 requests per second, not {self.rate:g}")

    def __str__(self) -> str:
        return f"{self.users} users" if self.rate is None else f"{self.rate:g} requests/s"


@dataclass
class Window:
    """What came of one level.

    Args:
        start: when measuring began, in `time.perf_counter`.
        end: when it ended; requests under way then were followed to their end.
        samples: requests that were due in between.
        before: users' first requests, which do not count but whose tokens may.
    """

    start: float = 0.0
    end: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    before: list[Sample] = field(default_factory=list)

    @property
    def output_tokens(self) -> float:
        """Tokens that came while measuring, whoever had asked for them."""
        return sum(sample.tokens_between(self.start, self.end) for sample in (*self.samples, *self.before))


async def run(level: Level, ask: Ask, duration: float, seed: int) -> Window:
    """Put a demand on a server for so many seconds.

    Args:
        level: the demand.
        ask: sends one request and follows it to its end.
        duration: seconds of measuring; a closed loop begins once every user's first answer has ended.
        seed: fixes the arrivals of an open loop.
    """
    if level.users is not None:
        return await _closed(level.users, ask, duration)
    assert level.rate is not None
    return await _open(level.rate, ask, duration, seed)


async def _closed(users: int, ask: Ask, duration: float) -> Window:
    window, first, numbers = Window(), users, iter(range(10**9))

    async def user() -> None:
        nonlocal first
        begun = False
        while not window.end or time.perf_counter() < window.end:
            sample = await ask(next(numbers), time.perf_counter())
            (window.samples if window.start and sample.due >= window.start else window.before).append(sample)
            if not begun:
                begun, first = True, first - 1
            if first == 0 and not window.start:
                window.start = time.perf_counter()
                window.end = window.start + duration
            if sample.status == BUSY:
                await asyncio.sleep(min(sample.retry_after_s, _LONGEST_WAIT_S))
            elif not sample.whole:
                await asyncio.sleep(0.1)  # whoever is refused at once does not spin

    await asyncio.gather(*(user() for _ in range(users)))
    return window


async def _open(rate: float, ask: Ask, duration: float, seed: int) -> Window:
    due = arrivals(rate, duration, seed)
    began = time.perf_counter() + 0.01
    running = []
    for number, offset in enumerate(due):
        await asyncio.sleep(max(0.0, began + offset - time.perf_counter()))
        running.append(asyncio.ensure_future(ask(number, began + offset)))
    samples = list(await asyncio.gather(*running))
    return Window(began, began + duration, samples)


def arrivals(rate: float, duration: float, seed: int) -> list[float]:
    """Seconds at which requests of an open loop are due, within so many seconds.

    Raises:
        UsageError: hardly one would come.
    """
    if rate * duration < 2:
        raise UsageError(f"{rate:g} requests per second for {duration:g} s are hardly one; give a longer --duration")
    gaps = np.random.default_rng(seed).exponential(1 / rate, int(2 * rate * duration) + 100)
    due = np.cumsum(gaps)
    return [float(moment) for moment in due[due < duration]]
