"""mT5: T5's attention under another name."""

from __future__ import annotations

from .interface import Architecture
from .t5 import forward

ARCHITECTURE = Architecture({"MT5Attention.forward": forward}, asks=True)
