"""The seam between an artifact and the formats of others: an `Exporter` plans, refuses, writes and reads back.

    artifact, checkpoint ─ Outgoing ─▶ plan ─▶ Plan.write(folder) ─▶ Written
                                        └ refusals, before anything is written

A format is one file here that defines ``EXPORTER``.  Its contract:

    plan    looks at every layer's scheme and scales and raises UnsupportedError for what the format, or the programs
            that load it, cannot hold exactly; names the layer and what to do
    write   fills an empty folder that the caller renames, a tensor at a time; then reads the files and compares every
            integer, scale and zero point with the artifact's
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ._outgoing import Outgoing


@dataclass(frozen=True)
class Written:
    """What an export holds.

    Args:
        exported: artifact layers whose integers were read back from the files and are equal.
        kept_float: (layer, reason) of every linear or embedding that is float in the files.
        notes: what a user must know of the files.
    """

    exported: tuple[str, ...]
    kept_float: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


class Plan(Protocol):
    """An export that nothing is known to stand in the way of."""

    def write(self, folder: Path) -> Written:
        """Fill an empty folder and read it back.

        Raises:
            RoundexportError: what was read back is not what the artifact holds.
        """


@dataclass(frozen=True)
class Exporter:
    """How one format is written.

    Args:
        title: the format's name, for people.
        plan: what an artifact becomes in it; UnsupportedError where it cannot be held.
    """

    title: str
    plan: Callable[[Outgoing], Plan]
