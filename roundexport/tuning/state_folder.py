"""`<out>.partial`, the folder of an interrupted run: ownership is checked before anything in it is read or removed.

A folder of that name is resumed, cleared or removed only if this program made it: it holds the marker ``tuning.json``
or a state.json of our format, or is empty.  Any other folder belongs to the user and is refused untouched, as are
links, which could lead out of it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from roundexport.errors import UsageError
from roundexport.storage.atomic import replace_file
from roundexport.storage.locks import writing

STATE, MARKER = "state.json", "tuning.json"
FORMAT = "roundexport-tuning/2"
_OURS = "roundexport-tuning/"


def folder_of(out: Path) -> Path:
    """The state folder of an artifact folder."""
    return out.with_name(f"{out.name}.partial")


def again(folder: Path) -> str:
    """How to begin anew, in words that are right for every verb that tunes: of them only `tune` has a flag for it."""
    return f"to begin again remove {folder} (tune also takes --no-resume, resume=False)"


def claim(folder: Path) -> None:
    """Make the folder, or make sure that it is one of ours.

    Raises:
        UsageError: something else is there, or a link leads out of it.
    """
    try:
        folder.mkdir(exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{folder} cannot be made: a file or a link is in its way; remove it") from error
    if not is_ours(folder):
        raise UsageError(
            f"{folder}, where the run would keep its state, exists and was not made by roundexport; "
            "rename it, or choose another output folder"
        )
    for path in (*folder.iterdir(), *(folder / "artifact").glob("*")):
        if path.is_symlink():
            raise UsageError(f"{path} is a link, which no run leaves; remove it, or, {again(folder)}")
    if not (folder / MARKER).is_file():
        replace_file(folder / MARKER, (json.dumps({"format": FORMAT}) + "\n").encode())


def is_ours(folder: Path) -> bool:
    """Whether a folder is a run's state; an empty one is, as a run may be killed right after it made it."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = [path.name for path in folder.iterdir() if not path.name.startswith(f".{MARKER}.partial-")]
    return not names or any(_has_format(folder / name) for name in (MARKER, STATE))


def clear(folder: Path) -> None:
    """Remove everything in a folder of ours but its marker; links are removed, not followed."""
    for entry in folder.iterdir():
        if entry.name != MARKER:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def refuse_existing(out: Path) -> None:
    """Refuse an output that exists; beside a finished artifact, remove what a run killed at its very end left.

    Raises:
        UsageError: ``out`` exists.
    """
    if not os.path.lexists(out):
        return
    folder = folder_of(out)
    if (out / "manifest.json").is_file() and is_ours(folder):
        with writing(out):
            shutil.rmtree(folder, ignore_errors=True)
    raise UsageError(f"{out} exists already; remove it or name another folder")


def _has_format(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and str(found.get("format")).startswith(_OURS)
