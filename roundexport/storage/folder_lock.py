"""A folder that one process at a time may write: held by an flock, which a killed process gives up by dying.

An flock belongs to the open file, and a process that is forked from the holder has it open too.  Libraries fork without
asking (openvino's telemetry does, to send something), and such a child outlives a killed parent by seconds, in which
the next run would be told that the folder is being written.  So a forked child closes the descriptors at once; that
does not unlock the parent's.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from roundexport.errors import UsageError

_held: set[int] = set()  # of the process, as descriptors are


def hold(folder: Path, out: Path) -> int:
    """Lock a folder.

    Args:
        folder: what to lock; it exists.
        out: what it is written for, for the error.

    Returns:
        The descriptor to give to :func:`release`.

    Raises:
        UsageError: another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise in_use(out) from error
        raise
    _held.add(handle)
    return handle


def release(handle: int) -> None:
    """Unlock what :func:`hold` locked; nothing in a forked child, which holds no lock."""
    if handle in _held:
        _held.remove(handle)
        os.close(handle)


def in_use(out: Path) -> UsageError:
    """The error for a folder that another run is writing."""
    return UsageError(f"{out} is being written by another run; wait for it or name another folder")


def _forget() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
