"""Answers to encoded sources: the likeliest token each time, or beam search, token for token as transformers has it.

Beam search keeps K rows a source.  At every step, of all K·V continuations with the highest log-probability, those that
end are finished answers with the score

    score = Σ log p / length ^ length_penalty

and the best K of the others go on.  A source is done when it has K finished answers that no running row can beat (by
the length it has, as transformers' default assumes), or with ``early_stopping`` when it has K of them.

``process`` may change the scores of the next tokens: it is given the rows so far [rows, T] and log-probabilities
[rows, V], and returns such.  Tokens that the model's files bind (start_tokens.py) are :func:`bound`.

Source: `_beam_search` and `_sample` of transformers 5.23's generation/utils.py; tests/runtime/test_beam_search.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from roundexport.errors import UsageError

from .start_tokens import StartTokens
from .types import Floats, Ids, Seq2SeqBackend, Seq2SeqSession

Process = Callable[[Ids, Floats], Floats]
_NEVER = np.float32(-1e9)


@dataclass(frozen=True)
class SearchSettings:
    """How answers are looked for.

    Args:
        beams: rows a source; 1 takes the likeliest token each time.
        length_penalty: exponent of the length; above 0 favors long answers.
        early_stopping: a source is done as soon as it has as many answers as beams.
        max_length: most tokens of an answer, those it begins with included.

    Raises:
        UsageError: a value is out of range.
    """

    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    max_length: int = 128

    def __post_init__(self) -> None:
        if self.beams < 1 or self.max_length < 2:
            raise UsageError(f"beams must be at least 1 and max_length at least 2; got {self}")


@dataclass(frozen=True)
class Hypothesis:
    """An answer.

    Args:
        tokens: without those that every answer begins with; the end-of-sequence token is among them.
        score: mean log-probability to the power of the length penalty, see above; without beams their sum.
    """

    tokens: tuple[int, ...]
    score: float


def search(
    backend: Seq2SeqBackend,
    encoded: Any,
    first: Ids,
    eos: Sequence[int],
    settings: SearchSettings,
    process: Process = lambda rows, scores: scores,
) -> list[Hypothesis]:
    """The best answer to each source.

    Args:
        backend: the opened model.
        encoded: what its encoder gave of N sources.
        first: tokens [N, S] that the answers begin with.
        eos: tokens that end an answer.
        settings: how to look.
        process: see above.
    """
    with backend.start(encoded, settings.beams) as session:
        if settings.beams == 1:
            return _greedy(session, first, eos, settings, process)
        return _Beams(session, first, eos, settings, process).run()


def _greedy(
    session: Seq2SeqSession, first: Ids, eos: Sequence[int], settings: SearchSettings, process: Process
) -> list[Hypothesis]:
    rows = first
    new, done = first, np.zeros(len(first), bool)
    sums, lengths = np.zeros(len(first)), np.zeros(len(first), int)
    while rows.shape[1] < settings.max_length and not done.all():
        scores = process(rows, _log_softmax(session.step(new)[:, -1]))
        chosen = scores.argmax(-1)
        sums += np.where(done, 0.0, scores[np.arange(len(rows)), chosen])
        lengths += ~done
        new = chosen[:, None].astype(np.int64)
        rows = np.concatenate([rows, new], 1)
        done |= np.isin(chosen, eos)
    start = first.shape[1]
    return [
        Hypothesis(tuple(map(int, row[start : start + length])), float(total))
        for row, length, total in zip(rows, lengths, sums, strict=True)
    ]


class _Beams:
    """Beam search while it runs: [N, K] rows that go on, and [N, K] that are finished."""

    def __init__(
        self, session: Seq2SeqSession, first: Ids, eos: Sequence[int], settings: SearchSettings, process: Process
    ) -> None:
        self._session, self._eos, self._settings, self._process = session, eos, settings, process
        beams = settings.beams
        self._start = first.shape[1]
        self._rows = np.repeat(first[:, None], beams, 1)
        self._scores = np.full((len(first), beams), _NEVER, np.float32)
        self._scores[:, 0] = 0
        self._done: list[list[tuple[float, tuple[int, ...], bool]]] = [
            [(float(_NEVER), (), False)] * beams for _ in first
        ]
        self._open = np.ones(len(first), bool)

    def run(self) -> list[Hypothesis]:
        new, order = self._rows.reshape(-1, self._start), None
        while True:
            logits = self._session.step(new, order)[:, -1]
            ended = self._advance(logits)
            order, length = self._order, self._rows.shape[2]
            new = self._rows[:, :, -1].reshape(-1, 1)
            self._judge(length)
            full = all(finished for one in self._done for _, _, finished in one)
            if not self._open.any() or (full and self._settings.early_stopping) or ended:
                break
        return [Hypothesis(one[0][1][self._start :], one[0][0]) for one in self._done]

    def _advance(self, logits: Floats) -> bool:
        """Choose what goes on and note what ends; whether nothing can go on."""
        count, beams, length = self._rows.shape
        flat = self._rows.reshape(-1, length)
        scores = self._process(flat, _log_softmax(logits)).reshape(count, beams, -1) + self._scores[:, :, None]
        width = scores.shape[-1]
        kept = min(max(2, 1 + len(self._eos)) * beams, beams * width)
        values, places = _largest(scores.reshape(count, -1), kept)
        came, tokens = places // width, places % width
        rows = np.concatenate([np.take_along_axis(self._rows, came[:, :, None], 1), tokens[:, :, None]], 2)
        ends = np.isin(tokens, self._eos) | (length + 1 >= self._settings.max_length)
        self._finish(rows, values, ends)
        running = values + ends.astype(np.float32) * _NEVER
        self._scores, chosen = _largest(running, beams)
        self._rows = np.take_along_axis(rows, chosen[:, :, None], 1)
        came = np.take_along_axis(came, chosen, 1)
        self._order = (came + beams * np.arange(count)[:, None]).reshape(-1).tolist()
        return bool(ends.all())

    def _finish(self, rows: Ids, values: Floats, ends: Any) -> None:
        beams = self._settings.beams
        length = np.float32((rows.shape[2] - self._start) ** self._settings.length_penalty)
        for source, done in enumerate(self._done):
            full = self._settings.early_stopping and all(finished for _, _, finished in done)
            if full or not self._open[source]:
                continue
            for place in range(beams):
                if ends[source, place]:
                    row = tuple(map(int, rows[source, place]))
                    done.append((float(values[source, place] / length), row, True))
            done.sort(key=lambda one: -one[0])
            del done[beams:]

    def _judge(self, length: int) -> None:
        """Close sources whose finished answers no running row can beat."""
        reach = np.float32((length - self._start) ** self._settings.length_penalty)
        for source, done in enumerate(self._done):
            best = self._scores[source, 0] / reach
            worst = min(score for score, _, _ in done)
            beaten = [best > (worst if finished else float(_NEVER)) for _, _, finished in done]
            self._open[source] &= any(beaten)


def bound(tokens: StartTokens, length: int, max_length: int) -> Process:
    """What keeps answers to the tokens that the model's files bind.

    Args:
        tokens: see start_tokens.py.
        length: tokens that answers begin with.
        max_length: most tokens of an answer.
    """

    def process(rows: Ids, scores: Floats) -> Floats:
        place = rows.shape[1]
        hidden = [*tokens.suppress, *(tokens.begin_suppress if place == length else ())]
        forced = tokens.forced_bos if place == 1 else tokens.forced_eos if place == max_length - 1 else None
        size = tokens.no_repeat_ngram_size
        if not hidden and forced is None and not 0 < size <= place:
            return scores
        scores = scores.copy()
        scores[:, hidden] = -np.inf
        if 0 < size <= place:
            for number, row in enumerate(rows.tolist()):
                scores[number, _repeating(row, size)] = -np.inf
        if forced is not None:
            scores[:] = -np.inf
            scores[:, forced] = 0
        return scores

    return process


def _repeating(row: list[int], size: int) -> list[int]:
    """Tokens that would complete a group of ``size`` tokens which the row has already."""
    tail = row[len(row) - size + 1 :]
    return [row[at + size - 1] for at in range(len(row) - size + 1) if row[at : at + size - 1] == tail]


def _largest(values: Floats, count: int) -> tuple[Floats, Any]:
    """The largest values of each row in descending order, and their places."""
    places = np.argpartition(-values, count - 1, axis=-1)[:, :count]
    found = np.take_along_axis(values, places, 1)
    order = np.argsort(-found, axis=-1, kind="stable")
    return np.take_along_axis(found, order, 1), np.take_along_axis(places, order, 1)


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(-1, keepdims=True)
    found: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found
