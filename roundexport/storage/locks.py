"""The right to write one target, or to work out what is kept: of one process at a time, which gives it up by dying.

    .<name>.roundexport-lock    beside the target while it is written; empty

The lock is `filelock`'s: flock or LockFileEx, and a marker with the process id where a system has neither.  The system
releases it when the holder is killed, so the next run for the same target knows what it finds for left over.  A process
that was forked from the holder does not hold it: filelock closes the descriptor there, as libraries fork without asking
(openvino's telemetry does) and such a child may outlive a killed parent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from roundexport.errors import UsageError

from .disk_errors import explained

_POLL_S = 0.2  # between two looks at a lock that another process has


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Hold the right to write ``out``, whose parent exists.

    Raises:
        UsageError: another run holds it, or nothing may be written there.
        WontFitError: the disk is full.
    """
    from filelock import FileLock, Timeout

    path, owner = out.parent / f".{out.name}.roundexport-lock", os.getpid()
    lock = FileLock(str(path), timeout=0, thread_local=False)
    try:
        with explained(out):
            lock.acquire()
    except Timeout as error:
        raise UsageError(f"{out} is being written by another run; wait for it or name another folder") from error
    try:
        yield
    finally:
        if os.getpid() == owner:  # not in a forked child that unwinds
            with suppress(OSError):  # Windows does not remove what is open; the next run does
                path.unlink()
            lock.release()


@contextmanager
def in_turn(path: Path, waiting: Callable[[], AbstractContextManager[object]] = nullcontext) -> Iterator[None]:
    """While it lasts, no other process is in here with the same lock file.

    Args:
        path: the lock file, which stays.
        waiting: entered for as long as another process is in here, which may take minutes.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with waiting():
            lock.acquire(poll_interval=_POLL_S)
    try:
        yield
    finally:
        lock.release()
