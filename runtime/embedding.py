"""Vectors for texts: tokenize, run the encoder in batches of similar length, pool, scale to length one.

    mean:  v = Σ_t mask_t · h_t / Σ_t mask_t        cls:  v = h_0        last:  v = h_{n−1}, n = Σ_t mask_t

A model's prompt (prompts.py) is put in front of every text first.  Batches are padded on the right.  Texts are sorted
by length first, so that short ones are not padded to the longest of all; the vectors come back in the texts' order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from roundexport.errors import UsageError
from roundexport.formats.package import PackageManifest
from roundexport.storage.paths import ListedFiles

from .prompts import FILE as PROMPTS
from .prompts import read_prompts
from .tokenizer import Tokenizer, read_json
from .types import EncoderBackend, EngineChoice, Floats, Ids


class Encoder:
    """An encoder package ready to give vectors.

    Args:
        backend: the opened graph.
        manifest: the package's description.
        folder: the package's folder; its tokenizer is read when first needed.
    """

    choice: EngineChoice | None = None
    """Which engine `load` opened it with, and why."""

    def __init__(self, backend: EncoderBackend, manifest: PackageManifest, folder: Path) -> None:
        assert manifest.pooling is not None, "read_package refuses encoders without pooling"
        self._backend = backend
        self._folder = folder
        self._pooling = manifest.pooling
        self._tokenizer: Tokenizer | None = None
        self.manifest = manifest
        # sentence-transformers models may be meant for shorter texts than the encoder could read.
        files = ListedFiles(folder, manifest.files)
        longest = read_json(files.find("sentence_bert_config.json")).get("max_seq_length")
        self.max_length = min(longest, manifest.max_context) if isinstance(longest, int) else manifest.max_context
        self.prompts = read_prompts(files.find(PROMPTS))

    @property
    def tokenizer(self) -> Tokenizer:
        """The package's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self._folder, self.manifest.files)
        return self._tokenizer

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, times of opening."""
        return self._backend.info()

    def encode(
        self, texts: Sequence[str], *, prompt: str | None = None, prompt_name: str | None = None
    ) -> dict[str, Ids]:
        """Model inputs [n, S] of texts with their prompt, as for :meth:`embed`, padded on the right.

        Raises:
            UsageError: no such prompt, or both a prompt and a name.
        """
        front = self.prompts.choose(prompt, prompt_name)
        found = self.tokenizer.encode_batch([front + text for text in texts], self.max_length)
        return self._padded([e.ids for e in found], [e.type_ids for e in found])

    def hidden(self, inputs: Mapping[str, Ids]) -> Floats:
        """Last hidden states [B, S, H]."""
        return self._backend.hidden(inputs)

    def pool(self, hidden: Floats, mask: Ids) -> Floats:
        """Embeddings [n, H] from hidden states [n, S, H] and the attention mask [n, S], right-padded."""
        mode = self._pooling["mode"]
        if mode == "cls":
            pooled = hidden[:, 0]
        elif mode == "last":
            pooled = hidden[np.arange(len(hidden)), mask.sum(1) - 1]
        else:
            weights = mask[:, None, :].astype(np.float32)
            pooled = (weights @ hidden)[:, 0] / weights.sum(2)
        if self._pooling["normalize"]:
            pooled = pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
        return np.ascontiguousarray(pooled, np.float32)

    def embed(
        self, texts: Sequence[str], batch_size: int = 32, *, prompt: str | None = None, prompt_name: str | None = None
    ) -> Floats:
        """Embeddings of texts.

        Args:
            texts: any number of texts; longer ones than ``max_length`` tokens are cut.
            batch_size: texts per run.
            prompt: text to put in front of each; "" for none.
            prompt_name: name of one of the model's prompts; None: its default, if it has one.

        Returns:
            float32 [n, H].

        Raises:
            UsageError: a single string instead of a list, a batch size below 1, or no such prompt.
        """
        if isinstance(texts, str):
            raise UsageError("embed takes a list of texts; put the single text into a list")
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {batch_size}")
        front = self.prompts.choose(prompt, prompt_name)
        found = self.tokenizer.encode_batch([front + text for text in texts], self.max_length)
        return self.embed_ids([e.ids for e in found], batch_size, [e.type_ids for e in found])

    def embed_ids(
        self, rows: Sequence[Sequence[int]], batch_size: int = 32, types: Sequence[Sequence[int]] | None = None
    ) -> Floats:
        """Embeddings [n, H] of token ids, special tokens included by the caller."""
        out = np.zeros((len(rows), self.manifest.hidden_size), np.float32)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = self._padded([rows[i] for i in chosen], [types[i] for i in chosen] if types else None)
            out[chosen] = self.pool(self.hidden(inputs), inputs["attention_mask"])
        return out

    def _padded(self, rows: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None) -> dict[str, Ids]:
        width = max((len(row) for row in rows), default=0)
        ids = np.full((len(rows), width), self.manifest.tokens["pad"] or 0, np.int64)
        mask, kinds = np.zeros_like(ids), np.zeros_like(ids)
        for number, row in enumerate(rows):
            if not row:
                raise UsageError(f"text {number + 1} of {len(rows)} has no tokens")
            ids[number, : len(row)] = row
            mask[number, : len(row)] = 1
            if types is not None:
                kinds[number, : len(row)] = types[number]
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}
