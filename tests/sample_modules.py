"""Modules of a sample's folder, which import one another by bare names."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

SAMPLES = Path(__file__).resolve().parents[1] / "samples"


@contextmanager
def sample_modules(folder: str, *names: str) -> Iterator[dict[str, ModuleType]]:
    """Modules by name while it lasts, imported in this order."""
    found = {}
    for name in names:
        spec = importlib.util.spec_from_file_location(name, SAMPLES / folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        found[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[name])
    try:
        yield found
    finally:
        for name in found:
            del sys.modules[name]
