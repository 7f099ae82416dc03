"""Finding methods, targets, kernels and engines: the file name is the registry key.

Dropping a file in (a folder, for a target) enrolls it; names starting with ``_`` are helpers.  A name is looked up in
the closed list of what is there before anything is imported: an unknown name gets the list, never an import.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from .errors import UsageError

_PACKAGES = {
    "rounding": "roundexport.algorithms.rounding",
    "transforms": "roundexport.algorithms.transforms",
    "finishers": "roundexport.algorithms.finishers",
    "targets": "roundexport.targets",
    "kernels": "roundexport.kernels",
    "engines": "roundexport.runtime.engines",
}
ALGORITHMS = ("rounding", "transforms", "finishers")
"""The kinds that together are called algorithms."""


def names(kind: str) -> list[str]:
    """Sorted names of one kind, or of all ``algorithms``, found without importing the modules."""
    if kind == "algorithms":
        return sorted(name for role in ALGORITHMS for name in names(role))
    package = importlib.import_module(_PACKAGES[kind])
    found = (m.name for m in pkgutil.iter_modules(package.__path__) if m.ispkg or kind != "targets")
    return sorted(name for name in found if not name.startswith("_"))


def load(kind: str, name: str) -> ModuleType:
    """Import one module by kind and name.

    Raises:
        UsageError: no such name; the text lists those that exist.
    """
    kinds = ALGORITHMS if kind == "algorithms" else (kind,)
    role = next((role for role in kinds if name in names(role)), None)
    if role is None:
        raise UsageError(f"unknown {kind.removesuffix('s')} {name!r}; known: {', '.join(names(kind))}")
    return importlib.import_module(f"{_PACKAGES[role]}.{name}")
