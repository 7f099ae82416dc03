"""Versions of the libraries that numbers depend on, for manifests and the keys of runs."""

from __future__ import annotations

from collections.abc import Iterable

_LIBRARIES = ("roundexport", "torch", "transformers", "numpy")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that the numbers depend on, by name."""
    from importlib.metadata import version

    return {name: version(name) for name in _LIBRARIES}


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of distributions by name, of those that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
