"""Workers that are processes of this machine: one pool of one process per place (concurrent.futures).

A pool of its own for each place, because what a worker has open is of use only to it, and because a pool is broken as
soon as one of its processes dies.  Processes are started anew and not forked, as torch's threads do not survive a fork.
They end with their parent, also where that is killed, and leave Ctrl-C to it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress

import psutil

from .messages import answer
from .pool import prepare


class ProcessPool:
    """Processes of this machine.

    Args:
        places: how many.
        threads: each computes with.
    """

    died: tuple[type[BaseException], ...] = (BrokenProcessPool,)

    def __init__(self, places: int, threads: int) -> None:
        self.places, self._threads = places, threads
        self._pids: dict[int, Future[int]] = {}
        self._pools: dict[int, ProcessPoolExecutor] = {}
        for place in range(places):
            self._start(place)

    def submit(self, place: int, message: bytes) -> Future[bytes]:
        """See :class:`roundexport.cluster.pool.Pool`."""
        try:
            return self._pools[place].submit(answer, message)
        except BrokenProcessPool as error:  # it died while nobody asked it for anything
            broken: Future[bytes] = Future()
            broken.set_exception(error)
            return broken

    def restart(self, place: int) -> None:
        """See :class:`roundexport.cluster.pool.Pool`."""
        self._pools[place].shutdown(wait=False, cancel_futures=True)
        self._start(place)

    def close(self) -> None:
        """See :class:`roundexport.cluster.pool.Pool`."""
        for place in self._pools:
            with suppress(Exception):
                psutil.Process(self._pids[place].result(timeout=0)).kill()  # what it is at is of no use any more
        for pool in self._pools.values():
            pool.shutdown(wait=True, cancel_futures=True)

    def describe(self) -> str:
        """See :class:`roundexport.cluster.pool.Pool`."""
        return f"{self.places} processes of this machine, {self._threads} thread{'s' * (self._threads > 1)} each"

    def _start(self, place: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pools[place] = ProcessPoolExecutor(1, context, _begin, (self._threads,))
        self._pids[place] = self._pools[place].submit(os.getpid)


def _begin(threads: int) -> None:
    """First of all in a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(threads)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
