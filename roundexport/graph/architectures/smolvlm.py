"""SmolVLM: Idefics3's image side under another name."""

from __future__ import annotations

from .idefics3 import forward
from .interface import Architecture

ARCHITECTURE = Architecture({"SmolVLMVisionEmbeddings.forward": forward})
