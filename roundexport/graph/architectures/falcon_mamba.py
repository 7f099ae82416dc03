"""Falcon-Mamba: a Mamba with norms inside its mixer."""

from .mamba import ARCHITECTURE

__all__ = ["ARCHITECTURE"]
