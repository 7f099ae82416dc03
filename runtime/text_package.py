"""What packages that read whole texts have in common: the tokenizer, batches padded on the right, one run of the graph.

Texts are sorted by length first, so that short ones are not padded to the longest of all; what comes out is in the
texts' order.  A text may be a pair, (query, document): the tokenizer puts both into one row, as the model was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Encoding

from roundexport.errors import UsageError
from roundexport.formats.package import PackageManifest

from .encoder_package import EncoderPackage
from .tokenizer import Text, Tokenizer
from .types import EncoderBackend, Ids


class TextPackage(EncoderPackage):
    """A package that reads texts, opened; its tokenizer is read when first needed.  See :class:`EncoderPackage`."""

    def __init__(self, backend: EncoderBackend, manifest: PackageManifest, folder: Path) -> None:
        super().__init__(backend, manifest, folder)
        self.max_length = manifest.max_context

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The package's tokenizer."""
        return Tokenizer(self._folder, self.manifest.files)

    def rows_of(self, texts: Sequence[Text]) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids and type ids of texts, cut to ``max_length``.

        Raises:
            UsageError: a single string instead of a list.
        """
        if isinstance(texts, str):
            raise UsageError("give a list of texts; put the single text into a list")
        found = self.tokenizer.encode_batch(texts, self.max_length)
        return [one.ids for one in found], self.types_of(found)

    def types_of(self, found: Sequence[Encoding]) -> list[list[int]]:
        """Type ids of tokenized texts: which text of a pair each token is of, where the model is told."""
        told = self.tokenizer.token_types
        return [one.type_ids if told else [0] * len(one.ids) for one in found]

    def batches(
        self, rows: Sequence[Sequence[int]], batch_size: int, types: Sequence[Sequence[int]] | None = None
    ) -> Iterator[tuple[list[int], dict[str, Ids]]]:
        """Places of some rows, and the graph's inputs for them.

        Raises:
            UsageError: a batch size below 1, or a text without tokens.
        """
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {batch_size}")
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            yield chosen, self.padded([rows[i] for i in chosen], [types[i] for i in chosen] if types else None)

    def padded(self, rows: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None) -> dict[str, Ids]:
        """The graph's inputs [n, S] for rows of token ids, padded on the right."""
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
