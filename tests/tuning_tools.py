"""What the tests of `tune` share: quick settings, and the bytes of a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Models = Callable[[str], Path]
QUICK: dict[str, Any] = {
    "group_size": 32, "num_samples": 6, "sample_len": 32, "steps": 6, "batch_size": 4, "progress": False,
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
