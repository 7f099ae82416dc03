"""What the tests of the command line share: the installed script, quick settings of `tune`, the type of `run`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

SMALL_TUNE = ("--bits", "4", "--group-size", "32", "--num-samples", "4", "--sample-len", "32", "--steps", "2")

SCRIPT = Path(sys.executable).with_name("roundexport")
COMMAND = "from roundexport.cli import main; main()"  # the same for a process that was forked, see warm_python.py

Run = Callable[..., tuple[int, str, str]]


def left_behind(folder: Path) -> list[str]:
    """Names in ``folder``, sorted."""
    return sorted(p.name for p in folder.iterdir())
