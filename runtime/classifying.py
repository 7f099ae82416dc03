"""Labels for texts, scores for pairs of a query and a document, labels for words, and words for a mask.

    classify   logits [n, labels]      Classifier        text or pair → label and score; query, documents → relevance
    tag        logits [n, S, labels]   TokenClassifier   text → label and score of every token, with its place
    fill       logits [n, S, V]        MaskFiller        text with the mask token → likeliest tokens in its place

Texts longer than the model reads are cut; of a pair the longer half is cut first, as transformers does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from roundexport.errors import UnsupportedError, UsageError
from roundexport.formats.package import PackageManifest
from roundexport.storage.paths import ListedFiles

from .labels import Labels, apply, read_labels, relevance
from .prompts import FILE as SETTINGS
from .text_package import TextPackage
from .tokenizer import Text, read_json
from .types import EncoderBackend, Floats, Ids


@dataclass(frozen=True)
class Classified:
    """What a classifier says of a text.

    Args:
        label: the likeliest.
        score: its score.
        scores: of every label by name, in the model's order.
    """

    label: str
    score: float
    scores: dict[str, float]


@dataclass(frozen=True)
class TokenLabel:
    """What a classifier of tokens says of one.

    Args:
        text: the piece of the text that the token stands for.
        start: its first character in the text.
        end: one past its last.
        label: the likeliest.
        score: its probability.
    """

    text: str
    start: int
    end: int
    label: str
    score: float


@dataclass(frozen=True)
class Filling:
    """A token in the place of a mask.

    Args:
        text: the token's.
        token: its id.
        score: its probability.
    """

    text: str
    token: int
    score: float


def classified(labels: Labels, logits: Floats) -> list[Classified]:
    """Label and scores for every row of logits [n, labels]."""
    scores = apply(labels.scores, logits)
    return [
        Classified(labels.names[i], float(row[i]), dict(zip(labels.names, row.tolist(), strict=True)))
        for i, row in zip(scores.argmax(-1), scores, strict=True)
    ]


class HeadedPackage(TextPackage):
    """A package with a head over labels, opened; see :class:`TextPackage`."""

    def __init__(self, backend: EncoderBackend, manifest: PackageManifest, folder: Path) -> None:
        super().__init__(backend, manifest, folder)
        files = ListedFiles(folder, manifest.files)
        self._config = read_json(files.find("config.json"))
        self._settings = read_json(files.find(SETTINGS))
        self._labels = read_labels(self._config, str(folder / "config.json"))
        longest = read_json(files.find("tokenizer_config.json")).get("model_max_length")
        if isinstance(longest, int) and longest > 0:
            self.max_length = min(longest, self.max_length)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels, in the order of the logits."""
        return self._labels.names


class Classifier(HeadedPackage):
    """A package that gives labels to texts, or scores to pairs of texts."""

    def logits(self, texts: Sequence[Text], batch_size: int = 32) -> Floats:
        """Logits [n, labels] of texts, or of pairs of texts.

        Args:
            texts: each a text, or a pair (query, document).
            batch_size: texts per run.

        Raises:
            UsageError: a single string instead of a list, or a batch size below 1.
        """
        rows, types = self.rows_of(texts)
        return self.logits_of_ids(rows, batch_size, types)

    def logits_of_ids(
        self, rows: Sequence[Sequence[int]], batch_size: int = 32, types: Sequence[Sequence[int]] | None = None
    ) -> Floats:
        """Logits [n, labels] of token ids, special tokens included by the caller."""
        out = np.zeros((len(rows), len(self.labels)), np.float32)
        for chosen, inputs in self.batches(rows, batch_size, types):
            out[chosen] = self.output(inputs)
        return out

    def classify(self, texts: Sequence[Text], batch_size: int = 32) -> list[Classified]:
        """Label and scores of every text, or pair of texts; arguments as for :meth:`logits`."""
        return classified(self._labels, self.logits(texts, batch_size))

    def score(self, query: str, documents: Sequence[str], batch_size: int = 32) -> Floats:
        """How relevant documents are to a query, as sentence-transformers' CrossEncoder says it: float32 [n].

        Raises:
            UnsupportedError: the model has several labels, or an activation that is not known.
            UsageError: a single string instead of a list of documents.
        """
        if isinstance(documents, str):
            raise UsageError("give a list of documents; put the single document into a list")
        rows, types = self.pairs(query, documents, self.max_length)
        return self.relevance(self.logits_of_ids(rows, batch_size, types))

    def pairs(
        self, query: str, documents: Sequence[str], max_length: int | None = None
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids and type ids of a query with each of several documents, cut to ``max_length``; None: not cut."""
        found = self.tokenizer.encode_batch([(query, document) for document in documents], max_length)
        return [one.ids for one in found], self.types_of(found)

    def relevance(self, logits: Floats) -> Floats:
        """Scores [n] of logits [n, 1].

        Raises:
            UnsupportedError: the model has several labels, or an activation that is not known.
        """
        if len(self.labels) != 1:
            few = ", ".join(self.labels[:5])
            raise UnsupportedError(
                f"documents are ranked by models with one label; this one has {len(self.labels)} ({few}): classify "
                "pairs (query, document) with it"
            )
        return apply(relevance(self._config, self._settings), logits)[:, 0]


class TokenClassifier(HeadedPackage):
    """A package that gives a label to every token of a text."""

    def logits(self, inputs: dict[str, Ids]) -> Floats:
        """Logits [B, S, labels] of inputs [B, S] by name."""
        return self.output(inputs)

    def classify(self, texts: Sequence[str], batch_size: int = 32) -> list[list[TokenLabel]]:
        """Labels of the tokens of every text, special tokens left out.

        Args:
            texts: any number of texts; longer ones than ``max_length`` tokens are cut.
            batch_size: texts per run.

        Raises:
            UsageError: a single string instead of a list, or a batch size below 1.
        """
        if isinstance(texts, str):
            raise UsageError("give a list of texts; put the single text into a list")
        found = self.tokenizer.encode_batch(texts, self.max_length)
        out: list[list[TokenLabel]] = [[] for _ in texts]
        for chosen, inputs in self.batches([one.ids for one in found], batch_size, self.types_of(found)):
            for row, logits in zip(chosen, self.logits(inputs), strict=True):
                encoding, scores = found[row], apply("softmax", logits)
                for place, special in enumerate(encoding.special_tokens_mask):
                    if special:
                        continue
                    (start, end), best = encoding.offsets[place], int(scores[place].argmax())
                    score = float(scores[place, best])
                    out[row].append(TokenLabel(texts[row][start:end], start, end, self.labels[best], score))
        return out


class MaskFiller(TextPackage):
    """A package that says which tokens may stand in the place of a mask."""

    def logits(self, inputs: dict[str, Ids]) -> Floats:
        """Logits [B, S, V] of inputs [B, S] by name."""
        return self.output(inputs)

    def fill(self, texts: Sequence[str], top: int = 5, batch_size: int = 8) -> list[list[list[Filling]]]:
        """The likeliest tokens for every mask of every text, likeliest first.

        Args:
            texts: each with the tokenizer's mask token, as in ``Paris is the [MASK] of France.``.
            top: tokens per mask.
            batch_size: texts per run.

        Raises:
            UsageError: a single string instead of a list, a text without a mask, or fewer than one token wanted.
            UnsupportedError: the tokenizer names no mask token.
        """
        if top < 1:
            raise UsageError(f"top must be at least 1, not {top}")
        mask = self.tokenizer.special_id("mask_token")
        if mask is None:
            raise UnsupportedError("the package's tokenizer_config.json names no mask token")
        rows, types = self.rows_of(texts)
        for number, row in enumerate(rows, 1):
            if mask not in row:
                raise UsageError(f"text {number} has no mask; write {self.tokenizer.special_text('mask_token')} in it")
        out: list[list[list[Filling]]] = [[] for _ in texts]
        for chosen, inputs in self.batches(rows, batch_size, types):
            for number, logits in zip(chosen, self.logits(inputs), strict=True):
                places = [place for place, token in enumerate(rows[number]) if token == mask]
                out[number] = [self._likeliest(scores, top) for scores in apply("softmax", logits[places])]
        return out

    def _likeliest(self, scores: Floats, top: int) -> list[Filling]:
        order = np.argsort(-scores, kind="stable")[:top].tolist()
        return [Filling(self.tokenizer.decode([token]), token, float(scores[token])) for token in order]
