"""Packages that answer a text with a text: translation, summaries, questions.

    source text ── tokenizer ── encoder ── beam_search.py ── tokenizer ── answer

Several texts are read and answered together, padded to the longest.  How many beams, and what binds the answer's
tokens, is what the model's files say (start_tokens.py) where a caller does not.

Limits: answers come whole, nothing streams; sampling and grammars are for decoders.  A package needs tokenizer.json,
which some models (Marian) come without.  Languages of a source are those of the tokenizer's own template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from roundexport.errors import UsageError

from .beam_search import Hypothesis, SearchSettings, bound, search
from .seq2seq_package import Seq2SeqPackage
from .types import Ids


@dataclass(frozen=True)
class Translation:
    """An answer to one text.

    Args:
        text: without special tokens.
        tokens: as they were written, end-of-sequence included.
        score: see `Hypothesis`.
        prompt_tokens: of the source.
    """

    text: str
    tokens: tuple[int, ...]
    score: float
    prompt_tokens: int


class Translator(Seq2SeqPackage):
    """A package that answers texts, ready to use."""

    def translate(
        self,
        texts: Sequence[str],
        *,
        max_new_tokens: int = 128,
        beams: int | None = None,
        length_penalty: float | None = None,
        language: str | None = None,
        batch_size: int = 8,
    ) -> list[Translation]:
        """Answer texts.

        Args:
            texts: sources.
            max_new_tokens: most tokens of an answer; the package's ``max_context`` may end it sooner.
            beams: rows of each source; None: as many as the model's files say, 1 where they are silent.
            length_penalty: exponent of the length that scores of beams are divided by; None: what the files say.
            language: text of the token that names the language of answers, as ``ro_RO``; None: what the files say.
            batch_size: texts at a time.

        Raises:
            UsageError: a single string, a text that is too long, or a language that the tokenizer does not have.
        """
        if isinstance(texts, str) or batch_size < 1:
            raise UsageError("give a list of texts, and a batch_size of at least 1")
        found = []
        for start in range(0, len(texts), batch_size):
            rows = [self.encode(text) for text in texts[start : start + batch_size]]
            answers = self.answer(rows, max_new_tokens, beams, length_penalty, language)
            found += [
                Translation(self.tokenizer.decode(answer.tokens), answer.tokens, answer.score, len(row))
                for row, answer in zip(rows, answers, strict=True)
            ]
        return found

    def encode(self, text: str) -> list[int]:
        """Token ids of a source.

        Raises:
            UsageError: it has none, or more than the package takes.
        """
        ids = self.tokenizer.encode(text)
        if not 0 < len(ids) <= self.max_length:
            raise UsageError(f"the text has {len(ids)} tokens; this package reads 1 to {self.max_length}")
        return ids

    def answer(
        self,
        rows: Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        beams: int | None = None,
        length_penalty: float | None = None,
        language: str | None = None,
    ) -> list[Hypothesis]:
        """The answers to sources of token ids; see :meth:`translate`."""
        tokens = self.start_tokens
        if language is not None:
            forced = self.tokenizer.raw.token_to_id(language)
            if forced is None:
                raise UsageError(f"language {language!r}: the tokenizer has no such token")
            tokens = replace(tokens, forced_bos=forced)
        settings = SearchSettings(
            beams=tokens.num_beams if beams is None else beams,
            length_penalty=tokens.length_penalty if length_penalty is None else length_penalty,
            early_stopping=tokens.early_stopping,
            max_length=min(1 + max_new_tokens, self.max_length),
        )
        encoded = self.backend.encode(self._padded(rows))
        first = np.full((len(rows), 1), tokens.decoder_start, np.int64)
        process = bound(tokens, 1, settings.max_length)
        return search(self.backend, encoded, first, self.manifest.tokens["eos"], settings, process)

    def _padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Ids]:
        """The encoder's inputs [n, E], padded on the right."""
        width = max(map(len, rows))
        ids = np.full((len(rows), width), self.manifest.tokens["pad"] or 0, np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
            mask[number, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}
