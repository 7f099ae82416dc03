"""Finding methods, targets, kernels and engines: the file name is the registry key.

Dropping a file in (a folder, for a target) enrolls it; names starting with ``_`` are helpers.  A name is looked up in
the closed list of what is there before anything is imported: an unknown name gets the list, never an import.

What a plug-in offers is one value of a class that its seam defines (``METHOD`` of a method, ``TARGET`` of a target).
:func:`load_value` checks that it is there and of that class, once, at loading; what it holds mypy has checked where it
was written.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from .errors import RoundexportError, UsageError

_PACKAGES = {
    "rounding": "roundexport.algorithms.rounding",
    "transforms": "roundexport.algorithms.transforms",
    "finishers": "roundexport.algorithms.finishers",
    "targets": "roundexport.targets",
    "importers": "roundexport.importers",
    "exporters": "roundexport.exporters",
    "kernels": "roundexport.kernels",
    "engines": "roundexport.runtime.engines",
    "architectures": "roundexport.graph.architectures",
    "mixtures": "roundexport.model.mixtures",
}
_TITLES = {"rounding": "rounding method"}  # a kind in words, where it is not the kind without its s
ALGORITHMS = ("rounding", "transforms", "finishers")
"""The kinds that together are called algorithms."""


def names(kind: str) -> list[str]:
    """Sorted names of one kind, or of all ``algorithms``, found without importing the modules."""
    if kind == "algorithms":
        return sorted(name for role in ALGORITHMS for name in names(role))
    package = importlib.import_module(_PACKAGES[kind])
    found = (m.name for m in pkgutil.iter_modules(package.__path__) if m.ispkg or kind != "targets")
    return sorted(name for name in found if not name.startswith("_") and name != "interface")


def load(kind: str, name: str) -> ModuleType:
    """Import one module by kind and name.

    Raises:
        UsageError: no such name; the text lists those that exist, and says what a name of another role is.
    """
    kinds = ALGORITHMS if kind == "algorithms" else (kind,)
    role = next((role for role in kinds if name in names(role)), None)
    if role is None:
        title = _title(kind)
        other = next((role for role in ALGORITHMS if kind in ALGORITHMS and name in names(role)), None)
        known = f"known: {', '.join(names(kind))}"
        if other is not None:
            raise UsageError(f"{name!r} is a {_title(other)}, not a {title}; {known}")
        raise UsageError(f"unknown {title} {name!r}; {known}")
    return importlib.import_module(f"{_PACKAGES[role]}.{name}")


def load_value(kind: str, name: str, attribute: str, *classes: type[Any], part: str = "") -> Any:
    """The value by which a plug-in offers what it can do.

    Args:
        kind: ``rounding``, ``transforms``, ``finishers`` or ``targets``.
        name: the plug-in's.
        attribute: name of the value in its module.
        classes: what the value must be an instance of one of.
        part: module inside the plug-in's folder that holds the value; "": the plug-in's own module.

    Raises:
        UsageError: no such plug-in, or it has no such part.
        RoundexportError: the plug-in does not define the value, or one of another class.
    """
    module = load(kind, name)
    if part:
        try:
            module = importlib.import_module(f"{module.__name__}.{part}")
        except ModuleNotFoundError as error:
            if error.name != f"{module.__name__}.{part}":
                raise
            raise UsageError(f"{_title(kind)} {name} has no {part}") from error
    value = getattr(module, attribute, None)
    if not isinstance(value, classes):
        wanted = " or ".join(f"{c.__name__}(...)" for c in classes)
        found = "defines none" if value is None else f"defines a {type(value).__name__}"
        raise RoundexportError(f"{module.__name__} must define {attribute} = {wanted}; it {found}")
    return value


def _title(kind: str) -> str:
    return _TITLES.get(kind, kind.removesuffix("s"))
