"""What `verify` found, kept in the package itself as ``verification.json``: an accuracy figure beside every speed.

The record names by sha256 the manifest that it is about, so that another export's record is not taken for this one's.
The package's manifest does not list it: the figures are told, and proved by running `verify` again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from roundexport.errors import RoundexportError
from roundexport.storage.atomic import replace_file

from .package import MANIFEST

RECORD = "verification.json"


def write_record(folder: Path, report: dict[str, Any]) -> bool:
    """Keep a report of `verify` in the package's folder; False where nothing can be written there.

    A report with NaN is no record, and none is kept: not JSON, and told as a failure.
    """
    document = {"manifest_sha256": _digest(folder), **report}
    try:
        text = json.dumps(document, indent=1, default=str, allow_nan=False)
    except ValueError:
        (folder / RECORD).unlink(missing_ok=True)
        return False
    try:
        replace_file(folder / RECORD, f"{text}\n".encode())
    except RoundexportError:  # a read-only folder, a full disk: the figures were told, and the package is as it was
        return False
    return True


def read_record(folder: Path) -> dict[str, Any] | None:
    """The report kept in a package's folder; None where there is none, or one of another export."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.pop("manifest_sha256", None) == _digest(folder):
            return found
    except (OSError, ValueError, RecursionError):
        return None
    return None


def joined(layers: Sequence[str]) -> str:
    """Names of layers, what they have in common said once: ``model.layers.0.mlp.gate_proj, up_proj``."""
    first = layers[0]
    within = first.rpartition(".")[0]
    return ", ".join([first, *(name.removeprefix(f"{within}.") if within else name for name in layers[1:])])


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
