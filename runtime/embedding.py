"""Vectors for texts: tokenize, run the encoder in batches of similar length, make vectors of what it gives.

Pooling and what follows it are in formats/embedding_head.py.  A model's prompt (prompts.py) is put in front of every
text first; batches are made in text_package.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from roundexport.errors import UnsupportedError, UsageError
from roundexport.formats.embedding_head import head_of
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
        # sentence-transformers models may be meant for shorter texts than the encoder could read.
        files = ListedFiles(folder, manifest.files)
        self._head = head_of(manifest.pooling, files, manifest.hidden_size)
        self.width = manifest.hidden_size if self._head is None else self._head.width(manifest.hidden_size)
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

    def vectors(self, inputs: Mapping[str, Ids]) -> Floats:
        """Embeddings [n, width] of the graph's inputs [n, S], right-padded."""
        found = self.output(inputs)
        return found if self._head is None else self._head(found, inputs["attention_mask"])

    def pool(self, hidden: Floats, mask: Ids) -> Floats:
        """Embeddings [n, width] from hidden states [n, S, H] and the attention mask [n, S], right-padded.

        Raises:
            UnsupportedError: the graph itself pools, so there are none.
        """
        if self._head is None:
            raise UnsupportedError("this package gives vectors, not hidden states; it was exported with pooled")
        return self._head(hidden, mask)

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
            float32 [n, width].

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
        """Embeddings [n, width] of token ids, special tokens included by the caller."""
        out = np.zeros((len(rows), self.width), np.float32)
        for chosen, inputs in self.batches(rows, batch_size, types):
            out[chosen] = self.vectors(inputs)
        return out
