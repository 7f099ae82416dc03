"""`Workers`: items handed to the processes of a pool, results in the order of the items, whoever dies meanwhile.

Items with a home go to one place each, as their home says, which has two of them at a time, one that is done and one
that waits, so that no process waits for the driver.  The others go to whoever is free.  Where a process dies, a new one
takes its place and its items are done again: parts are functions of what is on the disk, so their bytes are the same.
What kills three processes one after the other is given up, with the cause that is most likely.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

from roundexport.errors import WontFitError

from .messages import call, result
from .pool import Pool

_AT_ONCE = 2  # items that a place has, where they belong there
_DEATHS = 3  # of processes at one item

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Processes that do parts of the work.

    Args:
        pool: of the processes; closed with the workers.
        say: told what happens to them.
    """

    def __init__(self, pool: Pool, say: Callable[[str], None] = lambda text: None) -> None:
        self.pool, self._say = pool, say

    def __str__(self) -> str:
        return self.pool.describe()

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        homes: Sequence[int] | None = None,
        *,
        given_up: Callable[[WontFitError], Result] | None = None,
    ) -> Iterator[Result]:
        """What a function gives for each item, in their order; see :class:`roundexport.algorithms.parts.Parts`.

        Args:
            function: of a module.
            items: what it is given, one after the other.
            homes: the place of each, where it has one.
            given_up: what stands for an item that processes die of again and again; None: it ends the others too.

        Raises:
            WontFitError: processes die of an item again and again.
        """
        return _Round(self.pool, self._say, function, items, homes, given_up).results()

    def close(self) -> None:
        """End the processes."""
        self.pool.close()


class _Round:
    """Items on their way."""

    def __init__(
        self,
        pool: Pool,
        say: Callable[[str], None],
        function: Callable[[Any], Any],
        items: Sequence[Any],
        homes: Sequence[int] | None,
        given_up: Callable[[WontFitError], Any] | None,
    ) -> None:
        self._pool, self._say, self._function, self._items = pool, say, function, items
        self._given_up = given_up
        self._deaths = [0] * len(items)
        self._found: dict[int, Any] = {}
        self._running: dict[Future[bytes], tuple[int, int]] = {}  # place and number of an item
        everyone: deque[int] = deque(range(len(items)))
        self._queues = [everyone] * pool.places
        self._at_once = 1 if homes is None else _AT_ONCE
        if homes is not None:
            place = {home: number % pool.places for number, home in enumerate(sorted(set(homes)))}
            self._queues = [deque[int]() for _ in range(pool.places)]
            for number, home in enumerate(homes):
                self._queues[place[home]].append(number)

    def results(self) -> Iterator[Any]:
        try:
            for number in range(len(self._items)):
                while number not in self._found:
                    self._hand_out()
                    for future in wait(self._running, return_when=FIRST_COMPLETED).done:
                        self._take(future)
                yield self._found.pop(number)
        except KeyboardInterrupt:  # the processes are ended next, whatever they are at
            self._running = {}
            raise
        finally:
            for future in self._running:
                future.cancel()
            with contextlib.suppress(Exception):
                wait(self._running)  # else the next round would find processes at work for this one

    def _hand_out(self) -> None:
        for most in range(1, self._at_once + 1):  # everyone gets one before anyone gets two
            for place, queue in enumerate(self._queues):
                if queue and sum(at == place for at, _ in self._running.values()) < most:
                    number = queue.popleft()
                    message = call(self._function, self._items[number])
                    self._running[self._pool.submit(place, message)] = place, number

    def _take(self, future: Future[bytes]) -> None:
        if future not in self._running:  # its process died, and with it another item that was looked at before
            return
        place, number = self._running.pop(future)
        try:
            self._found[number] = result(future.result())
        except self._pool.died as error:
            self._died(place, number, error)

    def _died(self, place: int, number: int, error: BaseException) -> None:
        lost = sorted([number, *(own for at, own in self._running.values() if at == place)])
        self._running = {future: held for future, held in self._running.items() if held[0] != place}
        self._deaths[lost[0]] += 1  # the first of them was being done
        if self._deaths[lost[0]] >= _DEATHS:
            given_up = WontFitError(
                f"{_DEATHS} workers died one after the other at the same part of the work ({error}); most likely the "
                "system ended them for want of memory: use fewer workers, a smaller batch or --max-ram"
            )
            if self._given_up is None:
                raise given_up from error
            self._found[lost.pop(0)] = self._given_up(given_up)
        self._say(f"worker {place} died; another one takes its place and does its part again")
        self._pool.restart(place)
        self._queues[place].extendleft(reversed(lost))
