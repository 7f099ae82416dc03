"""Which commit this code is, where it runs from a git tree: for tables that are made bit by bit."""

from __future__ import annotations

import subprocess
from pathlib import Path


def tree_commit() -> str:
    """The commit of the git tree that this code is in, with a plus where files differ from it; empty outside of one.

    A virtual environment may lie in another project's tree; this file is not one of that tree's.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True, timeout=60)
        commit, changed = (
            subprocess.run([*git, *asked], capture_output=True, text=True, check=True, timeout=60).stdout.strip()
            for asked in (("rev-parse", "--short=10", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit + ("+" if changed else "")
