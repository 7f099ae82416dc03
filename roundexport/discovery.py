"""Finding algorithms, targets, kernels and engines: the file name is the registry key.

Dropping a file in (a folder, for a target) enrols it; names starting with ``_`` are helpers.  A name is looked up in
the closed list of what is there before anything is imported: an unknown name gets the list, never an import.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from .errors import UsageError

_PACKAGES = {
    "algorithms": "roundexport.algorithms",
    "targets": "roundexport.targets",
    "kernels": "roundexport.kernels",
    "engines": "roundexport.runtime",
}
_PREFIX = {"engines": "engine_"}


def names(kind: str) -> list[str]:
    """Sorted names of one kind, found without importing the modules."""
    package = importlib.import_module(_PACKAGES[kind])
    prefix = _PREFIX.get(kind, "")
    found = (m.name for m in pkgutil.iter_modules(package.__path__) if m.ispkg or kind != "targets")
    return sorted(name.removeprefix(prefix) for name in found if name.startswith(prefix) and not name.startswith("_"))


def load(kind: str, name: str) -> ModuleType:
    """Import one module by kind and name.

    Raises:
        UsageError: no such name; the text lists those that exist.
    """
    known = names(kind)
    if name not in known:
        raise UsageError(f"unknown {kind.removesuffix('s')} {name!r}; known: {', '.join(known)}")
    return importlib.import_module(f"{_PACKAGES[kind]}.{_PREFIX.get(kind, '')}{name}")
