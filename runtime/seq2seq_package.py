"""What packages with an encoder and a decoder have in common: the tokenizer, logits, and how an answer begins."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from roundexport.formats.package import PackageManifest

from .start_tokens import StartTokens, read_start_tokens
from .tokenizer import Tokenizer
from .types import EngineChoice, Floats, Ids, Seq2SeqBackend


class Seq2SeqPackage:
    """A package with an encoder and a decoder, opened.

    Args:
        backend: the opened graphs.
        manifest: the package's description.
        folder: the package's folder; its tokenizer is read when first needed.
    """

    choice: EngineChoice | None = None
    """Which engine `load` opened it with, and why."""

    def __init__(self, backend: Seq2SeqBackend, manifest: PackageManifest, folder: Path) -> None:
        self.backend = backend
        self.manifest = manifest
        self.max_length = manifest.max_context
        self.start_tokens: StartTokens = read_start_tokens(folder, manifest)
        self._folder = folder

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The package's tokenizer."""
        return Tokenizer(self._folder, self.manifest.files)

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, times of opening."""
        return self.backend.info()

    def logits(self, source: Mapping[str, NDArray[Any]], ids: Ids) -> Floats:
        """Logits [B, S, V] after every token of answers [B, S] without padding.

        Args:
            source: ``input_features``, or ``input_ids`` and ``attention_mask``, one row for each answer.
            ids: the answers, from their first token on.
        """
        with self.backend.start(self.backend.encode(source)) as session:
            return session.step(ids)
