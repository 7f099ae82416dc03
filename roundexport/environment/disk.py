"""Disk that work will take, said before it begins, and refused where less is free.

    needed = sum of parts, named, in bytes, less what an earlier run left there

Every verb that writes weights asks here, so that all say it in the same words.  Estimates are of weights and hidden
states; text and logs are small and left out.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from roundexport.errors import WontFitError

from .memory import GIB


def check_disk(folder: Path, work: str, parts: Mapping[str, float], advice: str, there: float = 0) -> str:
    """Refuse work that the disk cannot hold.

    Args:
        folder: where it writes; need not exist.
        work: what is to be done, as the subject of a sentence.
        parts: what is written, named, in bytes.
        advice: what its user can do.
        there: bytes of that which are there already.

    Returns:
        What it takes, in words.

    Raises:
        WontFitError: more than is free.
    """
    whole = folder.absolute()
    free = shutil.disk_usage(next(parent for parent in (whole, *whole.parents) if parent.exists())).free
    needed = max(0, sum(parts.values()) - there)
    told = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    if needed > free:
        raise WontFitError(
            f"{folder}: {work} takes about {needed / GIB:.2f} GiB of disk ({told}), {free / GIB:.2f} GiB are free; "
            f"{advice}"
        )
    return f"about {needed / GIB:.2f} GiB of disk ({told})"


def bytes_in(folder: Path) -> int:
    """Bytes of the files below a folder, as an earlier run left them; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
