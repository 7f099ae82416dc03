"""What the disk refuses, in words that help: the file by its final name, what the system said, and what to do."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from roundexport.errors import RoundexportError, UsageError, WontFitError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_BYTES = 1 << 20  # less than this is free: a failure of a library that writes by itself came from a full disk
_WONT_FIT = {
    errno.EFBIG: "the file would be larger than the file system or `ulimit -f` allows; write elsewhere or raise it",
    errno.EMFILE: "this process has too many files open; raise the limit (`ulimit -n 4096`)",
    errno.ENFILE: "the system has too many files open; close other programs or raise fs.file-max",
}
_USAGE = {
    errno.EROFS: "the file system is read-only; write elsewhere",
    errno.EACCES: "permission is denied; write elsewhere or change the folder's permissions",
    errno.EPERM: "the system does not permit it; write elsewhere",
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter one",
}


@contextmanager
def explained(path: Path, aside: Path | None = None) -> Iterator[None]:
    """Turn what the disk refuses into an error that names ``path`` and says what to do.

    Args:
        path: what is being written.
        aside: where it grows until it is renamed to ``path``; errors name the final place instead.

    Raises:
        WontFitError: the disk is full, met directly or as the cause of another error, a file is too large, or too
            many files are open.
        UsageError: nothing may be written there.
    """
    try:
        yield
    except RoundexportError as error:
        if aside is not None and str(aside) in str(error):
            error.args = (str(error).replace(str(aside), str(path)), *error.args[1:])
        raise
    except Exception as error:
        found = _explanation(error, path, aside)
        if found is None:
            raise
        raise found from error


def _explanation(error: Exception, path: Path, aside: Path | None) -> RoundexportError | None:
    cause = _cause(error)
    code, place = (None, str(path)) if cause is None else (cause.errno, _place(cause, path, aside))
    where = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(where).free
    if code in _FULL or (cause is None and free < _FULL_BYTES):
        return WontFitError(
            f"the disk is full: could not write {place or path} ({free >> 20} MiB free at {where}); "
            "free some space or write elsewhere"
        )
    if code in _WONT_FIT:
        return WontFitError(f"could not write {place or path}: {_WONT_FIT[code]}")
    if code in _USAGE and place is not None:
        return UsageError(f"could not write {place}: {_USAGE[code]}")
    return None


def _place(cause: OSError, path: Path, aside: Path | None) -> str | None:
    """What could not be written, by its final name; None where the error is about another file, such as one read."""
    if not isinstance(cause.filename, str):
        return str(path)
    if aside is not None and Path(cause.filename).is_relative_to(aside):
        return str(path / Path(cause.filename).relative_to(aside))
    if Path(cause.filename).is_relative_to(path):
        return cause.filename
    beside = Path(cause.filename)  # the lock or the partial folder itself
    return str(path) if beside.parent == path.parent and beside.name.startswith(f".{path.name}.") else None


def _cause(error: BaseException | None) -> OSError | None:
    """The first error of the system among an error and those that led to it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        error = error.__cause__ or error.__context__
    return None
