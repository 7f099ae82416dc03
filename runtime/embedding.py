"""Vectors for texts: tokenize, run the encoder in batches of similar length, pool, scale to length one.

    mean:  v = Σ_t mask_t · h_t / n,  n = Σ_t mask_t        cls:  v = h_0            last:  v = h_{n−1}
    mean_sqrt_len:  Σ_t mask_t · h_t / √n                   max:  over the tokens    weightedmean:  token t weighs t + 1

A model's prompt (prompts.py) is put in front of every text first; batches are made in text_package.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from roundexport.errors import UsageError
from roundexport.formats.package import PackageManifest
from roundexport.storage.paths import ListedFiles

from .prompts import FILE as PROMPTS
from .prompts import read_prompts
from .text_package import TextPackage
from .tokenizer import read_json
from .types import EncoderBackend, Floats, Ids


class Encoder(TextPackage):
    """An encoder package ready to give vectors.

    Args:
        backend: the opened graph.
        manifest: the package's description.
        folder: the package's folder; its tokenizer is read when first needed.
    """

    def __init__(self, backend: EncoderBackend, manifest: PackageManifest, folder: Path) -> None:
        assert manifest.pooling is not None, "read_package refuses encoders without pooling"
        super().__init__(backend, manifest, folder)
        self._pooling = manifest.pooling
        # sentence-transformers models may be meant for shorter texts than the encoder could read.
        files = ListedFiles(folder, manifest.files)
        longest = read_json(files.find("sentence_bert_config.json")).get("max_seq_length")
        self.max_length = min(longest, manifest.max_context) if isinstance(longest, int) else manifest.max_context
        self.prompts = read_prompts(files.find(PROMPTS))

    def encode(
        self, texts: Sequence[str], *, prompt: str | None = None, prompt_name: str | None = None
    ) -> dict[str, Ids]:
        """Model inputs [n, S] of texts with their prompt, as for :meth:`embed`, padded on the right.

        Raises:
            UsageError: no such prompt, or both a prompt and a name.
        """
        front = self.prompts.choose(prompt, prompt_name)
        return self.padded(*self.rows_of([front + text for text in texts]))

    def hidden(self, inputs: Mapping[str, Ids]) -> Floats:
        """Last hidden states [B, S, H]."""
        return self.output(inputs)

    def pool(self, hidden: Floats, mask: Ids) -> Floats:
        """Embeddings [n, H] from hidden states [n, S, H] and the attention mask [n, S], right-padded."""
        mode = self._pooling["mode"]
        if mode == "cls":
            pooled = hidden[:, 0]
        elif mode == "last":
            pooled = hidden[np.arange(len(hidden)), mask.sum(1) - 1]
        elif mode == "max":
            pooled = np.where(mask[:, :, None] == 1, hidden, -np.inf).max(1)
        else:
            weights = mask[:, None, :].astype(np.float32)
            if mode == "weightedmean":
                weights *= np.arange(1, mask.shape[1] + 1, dtype=np.float32)
            total = weights.sum(2)
            pooled = (weights @ hidden)[:, 0] / (np.sqrt(total) if mode == "mean_sqrt_len" else total)
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
        front = self.prompts.choose(prompt, prompt_name)
        rows, types = self.rows_of([front + text for text in texts])
        return self.embed_ids(rows, batch_size, types)

    def embed_ids(
        self, rows: Sequence[Sequence[int]], batch_size: int = 32, types: Sequence[Sequence[int]] | None = None
    ) -> Floats:
        """Embeddings [n, H] of token ids, special tokens included by the caller."""
        out = np.zeros((len(rows), self.manifest.hidden_size), np.float32)
        for chosen, inputs in self.batches(rows, batch_size, types):
            out[chosen] = self.pool(self.hidden(inputs), inputs["attention_mask"])
        return out
