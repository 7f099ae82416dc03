"""Files and folders that appear complete or not at all.

    write_folder   .<name>.partial-<pid> beside the target ─ fsync of every file and folder ─ rename ─ fsync parent
    replace_file   the same for one file

One process at a time writes a target (locks.py): the lock of a process that was killed is gone, so the next run for the
same target removes the partial folder it finds.  Only folders of exactly that name are removed, and links never.

Folders are flushed where the system lets one be opened, which Windows does not.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from roundexport.errors import UsageError

from .disk_errors import explained
from .locks import writing


@contextmanager
def write_folder(out: Path) -> Iterator[Path]:
    """Write a folder aside and rename it into place when everything succeeded.

    Args:
        out: the folder to make; missing parents are made too.

    Yields:
        An empty sibling folder on the same file system, to be filled.

    Raises:
        UsageError: ``out`` exists, another process is writing it, or nothing may be written there.
        WontFitError: the disk is full.  After any error nothing is left.
    """
    out = Path(os.path.abspath(out))
    _refuse_existing(out)
    owner = os.getpid()
    partial = out.parent / f".{out.name}.partial-{owner}"
    made = make_parents(out.parent)
    try:
        with explained(out), writing(out):
            _refuse_existing(out)  # who held the lock until now may have finished it
            _remove_stale(out)
            partial.mkdir()
            try:
                with explained(out, aside=partial):
                    yield partial
                    sync_folder(partial)
                    _move(partial, out)
            except BaseException:
                if os.getpid() == owner:  # not in a forked child that unwinds
                    shutil.rmtree(partial, ignore_errors=True)
                raise
    except BaseException:
        remove_empty(made)
        raise


def replace_file(path: Path, data: bytes) -> None:
    """Write a file aside, fsync it and rename it over ``path``: readers see old bytes or new ones, never a part.

    Raises:
        WontFitError: the disk is full; ``path`` is as it was.
        UsageError: nothing may be written there.
    """
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with explained(path, aside):
        try:
            with open(aside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            raise
        sync(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush every file and folder below ``folder``, and itself, to the disk (fsync)."""
    for current, _, files in os.walk(folder, topdown=False):
        for file in files:
            sync(Path(current, file))
        sync(Path(current))


def sync(path: Path) -> None:
    """Flush one file or folder to the disk (fsync)."""
    writable = os.O_RDWR | getattr(os, "O_BINARY", 0)  # Windows flushes only what was opened for writing
    try:
        handle = os.open(path, os.O_RDONLY if os.name == "posix" else writable)
    except PermissionError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_parents(folder: Path) -> list[Path]:
    """Make ``folder``; returns what had to be made, innermost first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{folder} is not a folder, so nothing can be written there") from error
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Remove folders that :func:`make_parents` made, as far as nobody else uses them by now."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise UsageError(f"{out} exists already; remove it or name another folder")


def _remove_stale(out: Path) -> None:
    """Remove partial folders of ``out``, whose writers are dead as this process holds the lock."""
    ours = re.compile(rf"\.{re.escape(out.name)}\.partial-\d+")
    for entry in sorted(out.parent.iterdir()):
        if ours.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)


def _move(partial: Path, out: Path) -> None:
    if os.path.lexists(out):
        raise UsageError(f"{out} appeared while it was being written; remove it or name another folder")
    os.rename(partial, out)
    sync(out.parent)
