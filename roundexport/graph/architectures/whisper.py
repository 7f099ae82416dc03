"""Whisper: both halves read their tables of positions as matrices."""

from __future__ import annotations

from .interface import Architecture

ARCHITECTURE = Architecture({}, whole_tables=("embed_positions",), asks=True)
