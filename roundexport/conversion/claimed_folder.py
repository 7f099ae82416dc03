"""The folder of a conversion belongs to one request, and is taken up by the same request alone.

    OUT/request.json   what was asked for: the model's identity, settings by what is in their files, what graphs have
    OUT/quality.json   the result of a conversion that went to its end

A folder that holds something else is left alone.  Targets are not part of the request: further ones can be added.
Nor are gates and held-out text: what a gate did not let pass, and what has to pass other gates or is judged on another
text now, is verified again; anything else that is finished is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from roundexport.errors import Interrupted, UsageError
from roundexport.storage.atomic import make_parents, remove_empty, replace_file
from roundexport.storage.disk_errors import explained
from roundexport.storage.locks import writing
from roundexport.tuning.settings import FILES

from .asked_targets import Asked

REQUEST, RESULT = "request.json", "quality.json"


@contextmanager
def claimed(
    folder: Path,
    request: dict[str, Any],
    asked: Asked | None,
    judges: dict[str, Any],
    may_change: Callable[[Path], Collection[str]] = lambda _: (),
) -> Iterator[None]:
    """Make a folder for a request, or take up the one that an earlier run of the same request left.

    Nobody else works in it meanwhile.  A folder in which nothing was kept when the work fails is removed again.

    Args:
        folder: of the conversion.
        request: what is asked for, as JSON values.
        asked: targets of which something has to be left to do; None: nothing need be.
        judges: what decides whether packages are good; other ones than decided before are something to do.
        may_change: parts of the request that a folder takes with other values than it was begun with.

    Raises:
        UsageError: the folder is something else, or of another request, or finished, or another run works in it.
    """
    made = make_parents(folder.parent)
    try:
        with writing(folder):
            if os.path.lexists(folder):
                _check_same(folder, request, may_change(folder))
                if asked is not None:
                    _refuse_finished(folder, asked, judges)
            else:
                with explained(folder):
                    folder.mkdir()
            replace_file(folder / REQUEST, (json.dumps(request, indent=1) + "\n").encode())
            try:
                yield
            except BaseException:
                _remove_unused(folder)
                raise
    except BaseException:
        remove_empty(made)
        raise


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Ctrl-C says what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        kept = sorted(path.name for path in folder.iterdir() if path.name != REQUEST and not path.name.startswith("."))
        raise Interrupted(
            f"stopped; kept in {folder}: {', '.join(kept) or 'nothing yet'}; run the same command again to go on"
        ) from error


def write_result(folder: Path, result: dict[str, Any], judges: dict[str, Any]) -> None:
    """Keep what a conversion made and lost, and what decided, which says that it is finished."""
    kept = {**result, **judges}
    replace_file(folder / RESULT, (json.dumps(kept, indent=1, default=str) + "\n").encode())


def _remove_unused(folder: Path) -> None:
    """Remove a folder that holds nothing but its request."""
    if [path.name for path in folder.iterdir()] == [REQUEST]:
        (folder / REQUEST).unlink()
        folder.rmdir()


def _refuse_finished(folder: Path, asked: Asked, judges: dict[str, Any]) -> None:
    """Refuse a conversion of which nothing is left to do: every target was verified and held its gates."""
    if not (folder / RESULT).is_file():
        return
    result = _read_note(folder / RESULT)
    if any(name not in result or result[name] != value for name, value in judges.items()):
        return
    left_out = () if asked.by_name else result.get("left_out", ())
    targets = [name for name in asked.names if name not in left_out]
    parts = result.get("parts")  # of a conversion of every part of a model
    conversions = list(parts.values()) if isinstance(parts, dict) else [result]
    if (
        targets
        and all((folder / name).is_dir() for name in targets)
        and all(_held(one, targets) for one in conversions)
    ):
        made = ", ".join(str(folder / name) for name in targets)
        raise UsageError(
            f"{folder} holds a finished conversion of this very request, nothing is left to do: {made}; "
            "choose another output folder, or remove it to convert again"
        )


def _held(result: Any, targets: Sequence[str]) -> bool:
    """Whether every target was verified, and no gate failed."""
    found = result.get("quality") if isinstance(result, dict) else None
    reports = [found.get(name) if isinstance(found, dict) else None for name in targets]
    return all(isinstance(report, dict) and report.get("failures") == [] for report in reports)


def _check_same(folder: Path, request: dict[str, Any], may_change: Collection[str]) -> None:
    if not (folder / REQUEST).is_file():
        raise UsageError(f"{folder} exists already and is no conversion; remove it or name another folder")
    earlier = _read_note(folder / REQUEST)
    earlier["max_ram"] = None  # which requests recorded once
    keys = (request.keys() | earlier.keys()) - set(may_change)
    changed = sorted(key for key in keys if request.get(key) != earlier.get(key))
    if changed:
        was = ", ".join(
            f"another {key} file" if key in FILES else f"{key} {earlier.get(key, 'not recorded')!r}" for key in changed
        )
        raise UsageError(f"{folder} was begun with {was}; go on with those, or name another folder")


def _read_note(path: Path) -> dict[str, Any]:
    """A file of ours from an earlier run."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged ({error}); remove {path.parent}, or name another folder") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} is damaged (not an object); remove {path.parent}, or name another folder")
    return found
