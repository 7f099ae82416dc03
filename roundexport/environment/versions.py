"""Versions of the libraries that numbers depend on, for manifests and the keys of runs."""

from __future__ import annotations

from importlib.metadata import version

_LIBRARIES = ("roundexport", "torch", "transformers", "numpy")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that the numbers depend on, by name."""
    return {name: version(name) for name in _LIBRARIES}
