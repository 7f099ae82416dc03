"""What packages without a KV cache have in common: one run of the graph, of texts or of images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roundexport.formats.package import PackageManifest

from .types import EncoderBackend, EngineChoice, Floats


class EncoderPackage:
    """A package without a KV cache, opened.

    Args:
        backend: the opened graph.
        manifest: the package's description.
        folder: the package's folder.
    """

    choice: EngineChoice | None = None
    """Which engine `load` opened it with, and why."""

    def __init__(self, backend: EncoderBackend, manifest: PackageManifest, folder: Path) -> None:
        self._backend = backend
        self._folder = folder
        self.manifest = manifest

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, times of opening."""
        return self._backend.info()

    def output(self, inputs: Mapping[str, Any], vector: bool = False) -> Floats:
        """What the graph gives for inputs by name; those that it lacks are left out.

        Args:
            inputs: token ids [B, S] and what goes with them, or pixels [B, C, height, width].
            vector: the vector [B, D] is wanted that a model of images makes of its hidden states.
        """
        return self._backend.output(inputs, vector)
