"""The command line: `roundexport VERB …`."""

from __future__ import annotations

from .app import main

__all__ = ["main"]
