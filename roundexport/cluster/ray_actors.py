"""Workers that Ray places: one actor per worker, on whatever machine has room for it.

Each actor asks Ray for what it takes: as many CPUs as it has threads, and, where ``--max-ram`` says how much a worker
may hold, that much memory.  Without a number of CPUs an actor would count as none while it computes, and Ray would pack
a machine with them.  There are as many actors as have room now, beside whatever else the cluster does; machines that
come later are used by the next run.  An actor whose machine is lost raises ActorDiedError, and its place gets a new
actor, wherever there is room; where there is none for `_WAIT_S`, the run ends, and can be taken up with fewer.

Only messages pass through Ray's object store (messages.py): tasks, and codes of some hundred rows.  What is large goes
through the output folder, which every machine must see under the same path.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
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
    RayError,
)

from roundexport.environment.threads import VARIABLE, choose_threads
from roundexport.errors import UsageError, WontFitError

from .messages import answer
from .pool import prepare

_WAIT_S = 120.0  # for room in the cluster
_SETTLE_S = 5.0  # until what ended a moment ago is counted as free again
_FULL = (ObjectStoreFullError, OutOfDiskError)


class RayPool:
    """Actors of a Ray cluster.

    Args:
        address: of the cluster, as `ray.init` takes it.
        max_ram: GiB that a worker may hold; None: unknown, and no memory is asked for.

    Raises:
        UsageError: the cluster cannot be reached, or its workers cannot begin.
        WontFitError: it has no room for one worker.
    """

    died: tuple[type[BaseException], ...] = (ActorDiedError, ActorUnavailableError, OutOfMemoryError)

    def __init__(self, address: str, max_ram: float | None) -> None:
        self._address, self._actors = address, dict[int, Any]()
        self._joined = not ray.is_initialized()
        if self._joined:
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:  # of many kinds: nothing listens, another version, no cluster was started
                raise UsageError(
                    f"--cluster {address}: the Ray cluster cannot be reached ({_last_line(error)}); start one with "
                    "`ray start --head`, or share the work of this machine with --cluster local:N"
                ) from error
        try:
            self._begin(max_ram)
        except BaseException:
            self.close()
            raise

    def _begin(self, max_ram: float | None) -> None:
        """Start as many workers as have room."""
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        machines = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU")]
        least = int(min((machine["CPU"] for machine in machines), default=0))
        if least < 1:
            raise WontFitError(f"--cluster {self._address}: no machine of the Ray cluster has a CPU to give")
        self._threads = min(least, choose_threads().count) if VARIABLE in os.environ else least
        asked: dict[str, Any] = {"num_cpus": self._threads}
        if max_ram is not None:
            asked["memory"] = int(max_ram * 2**30)
        self._kind = ray.remote(**asked)(_Worker)
        most = sum(_room(machine, asked) for machine in machines)
        if not most:
            raise WontFitError(
                f"--cluster {self._address}: no machine has {self._threads} CPUs and {max_ram or 0:g} GiB for a worker"
            )
        begun = [self._start() for _ in range(_free(most, asked))]
        self._actors = dict(enumerate(begun))
        ready = _placed(begun)
        try:
            ray.get([*ready])
        except RayError as error:
            raise UsageError(
                f"--cluster {self._address}: a worker could not begin ({_last_line(error)}); every machine needs "
                "roundexport of the same version, and memory to import torch"
            ) from error
        kept = [*ready.values()]
        for actor in begun:
            if actor not in kept:
                ray.kill(actor)
        self._actors, self.places = dict(enumerate(kept)), len(kept)
        if not kept:
            raise WontFitError(
                f"--cluster {self._address}: no worker of {self._threads} CPUs got room in {_WAIT_S:.0f} s; something "
                "else runs there (`ray status`)"
            )

    def submit(self, place: int, message: bytes) -> Future[bytes]:
        """See :class:`roundexport.cluster.pool.Pool`."""
        try:
            return _told(self._actors[place].answer.remote(message).future())
        except Exception as error:  # a death, a full store; whatever else, whoever waits for the answer is told
            found: Future[bytes] = Future()
            found.set_exception(_explained(error))
            return found

    def restart(self, place: int) -> None:
        """See :class:`roundexport.cluster.pool.Pool`.

        Raises:
            WontFitError: no machine has room for it.
        """
        with suppress(Exception):
            ray.kill(self._actors[place])
        self._actors[place] = self._start()
        if not _placed([self._actors[place]]):
            raise WontFitError(
                f"--cluster {self._address}: a worker was lost, and no machine had room for another in "
                f"{_WAIT_S:.0f} s; run the same command again, and it goes on with as many as there is room for"
            )

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


def _placed(actors: Sequence[Any]) -> dict[Any, Any]:
    """What those answer that found room within `_WAIT_S`, or died there: answer -> actor."""
    asked = {actor.ready.remote(): actor for actor in actors}
    ready, _ = ray.wait([*asked], num_returns=len(asked), timeout=_WAIT_S)
    return {answer: asked[answer] for answer in ready}


def _free(most: int, asked: Mapping[str, Any]) -> int:
    """Workers for which there is room beside what else runs, at least one, of those that the machines could hold."""
    until, free = time.monotonic() + _SETTLE_S, 0
    while (free := _room(_available(), asked)) < most and time.monotonic() < until:
        time.sleep(_SETTLE_S / 20)
    return max(1, min(most, free))


def _available() -> Mapping[str, float]:
    found: Mapping[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return found


def _room(machine: Mapping[str, float], asked: Mapping[str, Any]) -> int:
    """Workers for which a machine has room."""
    by_memory = machine.get("memory", 0) // asked["memory"] if "memory" in asked else float("inf")
    return int(min(machine.get("CPU", 0) // asked["num_cpus"], by_memory))


def _last_line(error: BaseException) -> str:
    """What an error says at its end, where the cause is."""
    return str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__
