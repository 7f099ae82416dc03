"""Answers to a question in a text: the stretch of the text whose beginning and end the model holds likeliest.

    logits [n, S, 2]     softmax over the text's tokens of each column: p of the beginning, q of the end
    score(i, j)          p_i · q_j        i ≤ j < i + longest
    nothing              p_0 · q_0, the first token, where models trained with unanswerable questions put "not here"

A text longer than the model reads is read in windows that overlap by OVERLAP tokens, each with the question in front,
as transformers cut them; the best stretch of all windows counts.

Source: the question-answering pipeline of transformers 4, which 5 does not have any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from roundexport.errors import UsageError

from .labels import apply
from .text_package import TextPackage

if TYPE_CHECKING:
    from tokenizers import Encoding

    from .types import Floats

OVERLAP = 128


@dataclass(frozen=True)
class FoundAnswer:
    """A stretch of a text that answers a question.

    Args:
        text: its words.
        start: its first character in the text.
        end: one past its last.
        score: probability of its beginning times that of its end.
    """

    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class _Window:
    """A row of tokens: the question and a piece of the text, whose tokens are those from ``begin`` to ``end``."""

    ids: list[int]
    types: list[int]
    begin: int
    end: int
    offsets: list[tuple[int, int]]


class AnswerFinder(TextPackage):
    """A package that finds the answer to a question in a text."""

    def answers(
        self, question: str, text: str, top: int = 1, longest: int = 30, batch_size: int = 8
    ) -> list[FoundAnswer]:
        """The likeliest answers, likeliest first; that there is none is an answer without words.

        Args:
            question: what is asked.
            text: where the answer is looked for.
            top: answers to give, each another stretch.
            longest: tokens of the longest answer.
            batch_size: windows of the text per run.

        Raises:
            UsageError: a text without tokens, a question that leaves no room for it, or counts below 1.
        """
        if min(top, longest) < 1:
            raise UsageError(f"top and longest must be at least 1, not {top} and {longest}")
        (encoding,) = self.tokenizer.encode_batch([(question, text)])
        windows = list(self._windows(encoding))
        best: dict[tuple[int, int], float] = {}
        rows, types = [window.ids for window in windows], [window.types for window in windows]
        for chosen, inputs in self.batches(rows, batch_size, types):
            for number, logits in zip(chosen, self.output(inputs), strict=True):
                for start, end, score in _stretches(windows[number], logits, top, longest):
                    best[start, end] = max(score, best.get((start, end), 0.0))
        order = sorted(best, key=lambda place: (-best[place], place))[:top]
        return [FoundAnswer(text[start:end], start, end, best[start, end]) for start, end in order]

    def _windows(self, encoding: Encoding) -> Iterator[_Window]:
        """Rows that the model has room for; the question and the special tokens are in each."""
        types = self.types_of([encoding])[0]
        second = [place for place, part in enumerate(encoding.sequence_ids) if part == 1]
        if not second:
            raise UsageError("the text to look for an answer in has no tokens")
        first, behind = second[0], second[-1] + 1
        room = self.max_length - (len(encoding.ids) - len(second))
        if room < 1:
            raise UsageError(f"the question leaves no room for a text: the model reads {self.max_length} tokens")
        step = max(1, room - OVERLAP) if room > 2 * OVERLAP else max(1, room // 2)
        for begin in range(first, behind, step):
            end = min(begin + room, behind)

            def cut(values: list[int], begin: int = begin, end: int = end) -> list[int]:
                return [*values[:first], *values[begin:end], *values[behind:]]

            offsets = encoding.offsets[begin:end]
            yield _Window(cut(encoding.ids), cut(types), first, first + end - begin, offsets)
            if end == behind:
                return


def _stretches(window: _Window, logits: Floats, top: int, longest: int) -> Iterator[tuple[int, int, float]]:
    """The likeliest stretches of a window: first and last character, and score."""
    taken = np.array([0, *range(window.begin, window.end)])
    begins, ends = apply("softmax", logits[taken].T.copy())
    yield 0, 0, float(begins[0] * ends[0])
    scores = np.tril(np.triu(np.outer(begins[1:], ends[1:])), longest - 1)
    for place in np.argsort(-scores, axis=None, kind="stable")[:top].tolist():
        begin, end = divmod(place, scores.shape[1])
        if scores[begin, end] > 0:
            yield window.offsets[begin][0], window.offsets[end][1], float(scores[begin, end])
