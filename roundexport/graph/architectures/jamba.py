"""Jamba: Mamba's mixers with norms inside, attention between them."""

from .mamba import ARCHITECTURE

__all__ = ["ARCHITECTURE"]
