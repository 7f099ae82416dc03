"""Workers that Ray places: one actor per worker, on whatever machine has room for it.

Each actor asks Ray for what it takes: as many CPUs as it has threads, and, where ``--max-ram`` says how much a worker
may hold, that much memory.  Without a number of CPUs an actor would count as none while it computes, and Ray would pack
a machine with them.  There are as many actors as the cluster's CPUs allow now; machines that come later are used by the
next run.  An actor whose machine is lost raises ActorDiedError, and its place gets a new actor, wherever there is room.

Only messages pass through Ray's object store (messages.py): tasks, and codes of some hundred rows.  What is large goes
through the output folder, which every machine must see under the same path.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
)

from roundexport.environment.threads import VARIABLE, choose_threads
from roundexport.errors import UsageError, WontFitError

from .messages import answer
from .pool import prepare

_WAIT_S = 120.0  # for room in the cluster
_FULL = (ObjectStoreFullError, OutOfDiskError)


class RayPool:
    """Actors of a Ray cluster.

    Args:
        address: of the cluster, as `ray.init` takes it.
        max_ram: GiB that a worker may hold; None: unknown, and no memory is asked for.

    Raises:
        UsageError: the cluster cannot be reached.
        WontFitError: it has no room for one worker.
    """

    died: tuple[type[BaseException], ...] = (ActorDiedError, ActorUnavailableError, OutOfMemoryError)

    def __init__(self, address: str, max_ram: float | None) -> None:
        self._joined = not ray.is_initialized()
        if self._joined:
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:  # of many kinds: nothing listens, another version, no cluster was started
                reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
                raise UsageError(
                    f"--cluster {address}: the Ray cluster cannot be reached ({reason}); start one with "
                    "`ray start --head`, or share the work of this machine with --cluster local:N"
                ) from error
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        machines = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU")]
        least = int(min((machine["CPU"] for machine in machines), default=0))
        if least < 1:
            raise WontFitError(f"--cluster {address}: no machine of the Ray cluster has a CPU to give")
        self._threads = min(least, choose_threads().count) if VARIABLE in os.environ else least
        asked: dict[str, Any] = {"num_cpus": self._threads}
        if max_ram is not None:
            asked["memory"] = int(max_ram * 2**30)
        self._kind = ray.remote(**asked)(_Worker)
        self.places = sum(_room(machine, asked) for machine in machines)
        if not self.places:
            raise WontFitError(
                f"--cluster {address}: no machine has {self._threads} CPUs and {max_ram or 0:g} GiB for a worker"
            )
        self._actors = {place: self._start() for place in range(self.places)}
        try:
            ray.get([actor.ready.remote() for actor in self._actors.values()], timeout=_WAIT_S)
        except ray.exceptions.GetTimeoutError as error:
            self.close()
            raise WontFitError(
                f"--cluster {address}: {self.places} workers of {self._threads} CPUs got no room in {_WAIT_S:.0f} s; "
                "something else runs there (`ray status`)"
            ) from error

    def submit(self, place: int, message: bytes) -> Future[bytes]:
        """See :class:`roundexport.cluster.pool.Pool`."""
        try:
            return _told(self._actors[place].answer.remote(message).future())
        except Exception as error:  # a death, a full store; whatever else, whoever waits for the answer is told
            found: Future[bytes] = Future()
            found.set_exception(_explained(error))
            return found

    def restart(self, place: int) -> None:
        """See :class:`roundexport.cluster.pool.Pool`."""
        with suppress(Exception):
            ray.kill(self._actors[place])
        self._actors[place] = self._start()

    def close(self) -> None:
        """See :class:`roundexport.cluster.pool.Pool`."""
        for actor in self._actors.values():
            with suppress(Exception):
                ray.kill(actor)
        if self._joined:
            ray.shutdown()

    def describe(self) -> str:
        """See :class:`roundexport.cluster.pool.Pool`."""
        return f"{self.places} Ray workers, {self._threads} CPU{'s' * (self._threads > 1)} each"

    def _start(self) -> Any:
        return self._kind.remote(self._threads)


def _told(answered: Future[bytes]) -> Future[bytes]:
    """The same answer, with a full store told in words."""
    told: Future[bytes] = Future()
    told.set_running_or_notify_cancel()  # whoever gives up waits until the actor is through

    def take(ended: Future[bytes]) -> None:
        error = ended.exception()
        if error is None:
            told.set_result(ended.result())
        else:
            told.set_exception(_explained(error))

    answered.add_done_callback(take)
    return told


def _explained(error: BaseException) -> BaseException:
    """An error of Ray, or of a task with its cause, in words where nothing of ours is at fault."""
    cause = getattr(error, "cause", None) or error
    if not isinstance(cause, _FULL):
        return error
    first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return WontFitError(
        f"Ray's object store is full, and no disk is left to spill to ({first}); free disk space below Ray's folder, "
        "or give the store more with `ray start --object-store-memory`, and run the same command again to go on"
    )


class _Worker:
    """An actor."""

    def __init__(self, threads: int) -> None:
        prepare(threads)

    def ready(self) -> bool:
        """Answers once it has been placed."""
        return True

    def answer(self, message: bytes) -> bytes:
        """What a message asks for."""
        return answer(message)


def _room(machine: dict[str, float], asked: dict[str, Any]) -> int:
    """Workers for which a machine has room."""
    by_memory = machine.get("memory", 0) // asked["memory"] if "memory" in asked else float("inf")
    return int(min(machine["CPU"] // asked["num_cpus"], by_memory))
