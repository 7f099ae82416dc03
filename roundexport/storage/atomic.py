"""Files and folders that appear complete or not at all, and names that stay inside their folder.

    write_folder   .<name>.partial-<pid> beside the target ─ fsync of every file and folder ─ rename ─ fsync parent
    replace_file   the same for one file

The partial folder is locked (folder_lock.py): the lock of a process that was killed is gone, so the next run for the
same target knows the folder for stale and removes it, whatever process ids were handed out since.

`safe_join` is the only way in which a name read from a file becomes a path.  Links are followed only where they end
inside the folder, or, for a snapshot folder of the Hugging Face cache, in that repository's own blobs.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TypedDict

from roundexport.errors import ArtifactError, UsageError, WontFitError

from . import folder_lock

MAX_MANIFEST_BYTES = 64 << 20
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def write_folder(out: Path) -> Iterator[Path]:
    """Write a folder aside and rename it into place when everything succeeded.

    Args:
        out: the folder to make; missing parents are made too.

    Yields:
        An empty sibling folder on the same file system, to be filled.

    Raises:
        UsageError: ``out`` exists, or another process is writing it.
        WontFitError: the disk is full.  After any error nothing is left.
    """
    out = Path(os.path.abspath(out))
    if os.path.lexists(out):
        raise UsageError(f"{out} exists already; remove it or name another folder")
    made = make_parents(out.parent)
    partial, lock = out.parent / f".{out.name}.partial-{os.getpid()}", -1
    try:
        with full_disk_as_wont_fit(out):
            _remove_stale(out)
            lock = _make_locked(partial, out)
            yield partial
            sync_folder(partial)
            _move(partial, out)
    except BaseException:
        if lock >= 0:
            shutil.rmtree(partial, ignore_errors=True)
        remove_empty(made)
        raise
    finally:
        if lock >= 0:
            folder_lock.release(lock)


@contextmanager
def full_disk_as_wont_fit(path: Path) -> Iterator[None]:
    """Turn a full disk, met directly or as the cause of another error, into a `WontFitError` that names ``path``."""
    try:
        yield
    except Exception as error:
        if isinstance(error, WontFitError) or not _is_full_disk(error):
            raise
        where = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(where).free >> 20
        raise WontFitError(
            f"the disk is full: could not write {path} ({free} MiB free at {where}); free some space or write elsewhere"
        ) from error


def replace_file(path: Path, data: bytes) -> None:
    """Write a file aside, fsync it and rename it over ``path``: readers see old bytes or new ones, never a part.

    Raises:
        WontFitError: the disk is full; ``path`` is as it was.
    """
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with full_disk_as_wont_fit(path):
        try:
            with open(aside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        sync(path.parent)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileEntry(TypedDict):
    """Identity of one file."""

    sha256: str
    size: int


def file_entry(path: Path) -> FileEntry:
    """Hash and size of a file, in bytes."""
    return {"sha256": sha256_file(path), "size": path.stat().st_size}


def check_files(folder: Path, files: Mapping[str, FileEntry], check_hashes: bool = True) -> None:
    """Hold the files of a folder against what its manifest says of them; other files are not looked at.

    Raises:
        ArtifactError: a name that leaves the folder, a file that is missing, or of another size or hash.
    """
    paths = {name: safe_join(folder, name) for name in files}  # refuse every bad name before touching any file
    for name, entry in sorted(files.items()):
        path = paths[name]
        if not path.is_file():
            raise ArtifactError(f"{folder}: the file {name} is missing")
        size = path.stat().st_size
        if size != entry["size"]:
            raise ArtifactError(f"{path} has {size} bytes, the manifest says {entry['size']}: incomplete or changed")
        if check_hashes and sha256_file(path) != entry["sha256"]:
            raise ArtifactError(f"{path} is damaged or was changed: its sha256 is not the manifest's; make it again")


def read_manifest(folder: Path, name: str, what: str) -> bytes:
    """The bytes of a folder's manifest.

    Raises:
        ArtifactError: none there, or larger than 64 MiB.
    """
    path = safe_join(folder, name)
    if not path.is_file():
        raise ArtifactError(f"{folder} is no {what}, or was left unfinished: it has no {name}")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{path} has {path.stat().st_size} bytes; more than {MAX_MANIFEST_BYTES} are not read")
    return path.read_bytes()


def safe_join(folder: Path, name: str) -> Path:
    """The path of a file that a manifest or index names.

    Args:
        folder: the folder that must not be left.
        name: relative name with forward slashes.

    Returns:
        ``folder / name``; it need not exist.

    Raises:
        ArtifactError: absolute, empty, ``.`` or ``..`` parts, backslashes, control characters, or a link out of it.
    """
    if not is_plain_name(name):
        raise ArtifactError(
            f"{folder}: the file name {name!r} is refused; names are relative and stay inside the folder"
        )
    path = folder / name
    root, target = folder.resolve(), path.resolve()
    if root not in target.parents and not (_in_hub_cache(folder) and root.parent.parent / "blobs" == target.parent):
        raise ArtifactError(
            f"{folder}: {name} is a link that leaves the folder, to {target}; put the file itself there"
        )
    return path


def is_plain_name(name: str) -> bool:
    """Whether ``name`` is relative, with forward slashes, and has no part that could lead out of its folder."""
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") for part in parts) and not PurePosixPath(name).is_absolute()
    return plain and "\\" not in name and ":" not in parts[0] and name.isprintable()


def sync_folder(folder: Path) -> None:
    """Flush every file and folder below ``folder``, and itself, to the disk (fsync)."""
    for current, _, files in os.walk(folder, topdown=False):
        for file in files:
            sync(Path(current, file))
        sync(Path(current))


def sync(path: Path) -> None:
    """Flush one file or folder to the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _in_hub_cache(folder: Path) -> bool:
    return folder.resolve().parent.name == "snapshots"


def make_parents(folder: Path) -> list[Path]:
    """Make ``folder``; returns what had to be made, innermost first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{folder} is not a folder, so nothing can be written there") from error
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Remove folders that :func:`make_parents` made, as far as nobody else uses them by now."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _make_locked(partial: Path, out: Path) -> int:
    """Make and lock the partial folder."""
    try:
        partial.mkdir()
        return folder_lock.hold(partial, out)
    except (FileExistsError, FileNotFoundError) as error:  # a run that started in this very moment
        raise folder_lock.in_use(out) from error


def _remove_stale(out: Path) -> None:
    """Remove partial folders of ``out`` whose writer is dead; refuse to start beside a living one."""
    prefix = f".{out.name}.partial-"
    for entry in sorted(out.parent.iterdir()):
        if not entry.name.startswith(prefix) or entry.is_symlink() or not entry.is_dir():
            continue
        handle = folder_lock.hold(entry, out)
        try:
            shutil.rmtree(entry)
        finally:
            folder_lock.release(handle)


def _move(partial: Path, out: Path) -> None:
    if os.path.lexists(out):
        raise UsageError(f"{out} appeared while it was being written; remove it or name another folder")
    os.rename(partial, out)
    sync(out.parent)


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one of those that led to it, says that the disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return True
        error = error.__cause__ or error.__context__
    return False
