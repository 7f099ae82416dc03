"""Folders that are made once per user and used again: $ROUNDEXPORT_CACHE, else $XDG_CACHE_HOME/roundexport.

    <cache>/<kind>/<key>        complete from the moment it is there: written aside and renamed (atomic.py)

The key says what the content depends on (a digest, and a number for the code that made it), so an entry is never
changed; to free the disk, remove the whole folder.  Several processes at once: one writes, the others wait for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from roundexport.errors import UsageError

from .atomic import write_folder

_POLL_SECONDS = 0.25


def cache_root() -> Path:
    """The cache folder of this user; it need not exist."""
    own = os.environ.get("ROUNDEXPORT_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "roundexport"


def cached_folder(kind: str, key: str, fill: Callable[[Path], None]) -> Path:
    """The folder ``kind/key`` of the cache, made by ``fill`` if it is not there.

    Args:
        kind: what is kept, one folder per kind.
        key: plain name that changes with everything the content depends on.
        fill: writes the content into an empty folder; what it raises leaves nothing behind.

    Raises:
        UsageError: the cache cannot be written.
        WontFitError: the disk is full.
    """
    folder = cache_root() / kind / key
    while not folder.is_dir():
        try:
            with write_folder(folder) as aside:
                fill(aside)
        except UsageError:
            if not folder.is_dir() and not _being_written(folder):
                raise
            time.sleep(_POLL_SECONDS)
    return folder


def _being_written(folder: Path) -> bool:
    """Whether another process has its lock or partial folder beside the one that is wanted."""
    return folder.parent.is_dir() and any(folder.parent.glob(f".{folder.name}.*"))
