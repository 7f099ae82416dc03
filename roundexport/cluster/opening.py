"""From ``--cluster`` to workers that are ready: processes are started and asked what they are.

Workers with other versions of the libraries would give other bytes, so they are refused; another instruction set is
told, as the bytes are those of one kind of machine (docs/cluster.md).
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from roundexport.environment.threads import choose_threads
from roundexport.errors import UsageError

from .address import Address
from .block_parts import SharedParts
from .messages import call, result
from .pool import About, Pool, about
from .processes import ProcessPool
from .spilling import Place
from .stores import check_store
from .workers import Workers

if TYPE_CHECKING:
    from roundexport.tuning.block_task import PartsOf


class Cluster:
    """Workers that share the work on a block; a :class:`roundexport.tuning.run.Workers`.

    Args:
        workers: the processes.
        store: URL below which they share tensors; None: they do so in the run's folder.
    """

    def __init__(self, workers: Workers, store: str | None = None) -> None:
        self.workers, self._store = workers, store

    def __str__(self) -> str:
        return str(self.workers) if self._store is None else f"{self.workers}, through {self._store}"

    def parts(self, folder: Path, source: str) -> PartsOf:
        """See :class:`roundexport.tuning.run.Workers`."""
        shared, store = Path(os.path.abspath(folder)), None
        if self._store is not None:  # nobody but this run writes below its output folder
            own = hashlib.sha256(f"{socket.gethostname()}:{shared}".encode()).hexdigest()[:16]
            store = f"{self._store.rstrip('/')}/roundexport-{own}"
        return lambda task, block, size: SharedParts(
            self.workers, Place(shared / f"{task.index:05}-{os.getpid()}", store), source, task, block, size
        )


@contextmanager
def open_cluster(
    text: str | None, *, say: Callable[[str], None] = lambda said: None, max_ram: float | None = None
) -> Iterator[Cluster | None]:
    """Workers as ``--cluster`` asks for them, until the context ends.

    Args:
        text: as in address.py; None: no workers.
        say: told what happens to them.
        max_ram: GiB that a worker will need at most, where that is known.

    Raises:
        UsageError: the text says nothing, a Ray cluster or a store cannot be reached, or a worker has other versions
            or cannot begin.
    """
    if text is None:
        yield None
        return
    address = Address.parse(text)
    if address.store is not None:
        check_store(address.store)
    workers = Workers(_pool(address, max_ram), say)
    try:
        _check(workers.pool, say)
        yield Cluster(workers, address.store)
    finally:
        workers.close()


def _pool(address: Address, max_ram: float | None) -> Pool:
    if address.local is not None:
        return ProcessPool(address.local, max(1, choose_threads().count // address.local))
    from .ray_actors import RayPool

    return RayPool(address.ray, max_ram)


def _check(pool: Pool, say: Callable[[str], None]) -> None:
    """Ask every worker what it is."""
    asked = [pool.submit(place, call(about)) for place in range(pool.places)]
    own = about()
    try:
        found: list[About] = [result(future.result()) for future in asked]
    except pool.died as error:
        raise UsageError(
            f"a worker of {pool.describe()} ended as it began ({error}); each imports torch and roundexport, so name "
            'fewer where memory is short, and in a script of your own let `if __name__ == "__main__":` stand before '
            "the call, as workers import that script"
        ) from error
    for worker in found:
        other = {name: version for name, version in worker.versions.items() if own.versions[name] != version}
        if other:
            name, version = next(iter(other.items()))
            raise UsageError(
                f"the worker on {worker.host} has {name} {version}, this process {own.versions[name]}; bytes would "
                "depend on who does what: install the same versions everywhere"
            )
    kinds = sorted({worker.capability for worker in (own, *found)})
    if len(kinds) > 1:
        say(
            f"note: machines of several kinds ({', '.join(kinds)}) share the work; the last bits of sums, and so some "
            "codes, will differ from those of a run on one kind"
        )
