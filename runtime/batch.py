"""Answers written together: rows of one session, into which answers come and from which they go at any time.

    admit ─▶ waiting ─▶ prompt read, in pieces ─▶ one token per advance, all answers in one run ─▶ finished

- An answer whose prompt begins like something the session still holds (a system prompt, the turns of a chat, the
  prompt of a twin) begins with a copy of that row, or with the row itself where nobody else needs it.  Only what
  differs is read; where rows cannot be cut back, what lies behind the last place from which one can go on.
- While others are writing, at most ``prompt_tokens`` tokens of prompts are read per advance, so that a long prompt
  makes the others slower and does not stop them; twice as many while nobody writes, which is a whole piece of what the
  engines read at once, so that whoever leaves or comes meanwhile is heeded soon.
- A single answer may be written several tokens at a time: a drafter guesses how it goes on, one run scores all guesses,
  and the guesses that the sampler would have chosen anyway are kept.  The sampler sees the same logits as without,
  up to the order of sums in the kernels, and as shipped to more than that (figures in drafting.py).

Source of the scheme: continuous batching, Yu et al., Orca (OSDI 2022); exact speculative decoding by agreement,
Leviathan et al. 2023 with a deterministic draft.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

from roundexport.errors import UnsupportedError

from .answer import Answer, Piece
from .types import DecoderBackend, Floats

SHARED = 16  # tokens from which a prefix is worth sharing
_STRETCH = 64  # tokens compared at once
KEPT_ROWS = 256  # kept at most, however short: every row has a slot, states of a fixed size, and is looked at
_TAKEN = 0.9  # of a kept row: from here on the row itself goes on, without a copy


class Drafter(Protocol):
    """Guesses how a row goes on; see drafting.py."""

    def guess(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        """At most so many tokens behind these; empty where it has no idea."""


@dataclass
class Counts:
    """What a batch has done.

    Args:
        read: prompt tokens computed.
        reused: prompt tokens that were in the cache already.
        written: tokens of answers.
        runs: runs of the graph.
        guessed: tokens that a drafter guessed.
        accepted: guesses that were kept.
    """

    read: int = 0
    reused: int = 0
    written: int = 0
    runs: int = 0
    guessed: int = 0
    accepted: int = 0

    def __sub__(self, earlier: Counts) -> Counts:
        """What has been done since."""
        return Counts(*(now - then for now, then in zip(astuple(self), astuple(earlier), strict=True)))


class Batch:
    """Answers that share a session.

    Args:
        backend: the opened graph.
        rows: answers to have room for from the start; more may come.
        expected: tokens of each, prompt and answer.
        keep: tokens of finished rows to keep for answers that begin like them, of `KEPT_ROWS` rows; 0 keeps none.
        prompt_tokens: tokens of prompts that are read per advance while other answers are being written, half of what
            is read while none is; None: all.
        drafter: guesses tokens of an answer that is written alone.
        on_error: told of an answer that could not take its next token, and why; it has left then, and the others go
            on.  None: that error ends the advance.

    Raises:
        UnsupportedError: a drafter, for a model whose rows cannot be cut back.
    """

    def __init__(
        self,
        backend: DecoderBackend,
        *,
        rows: int = 1,
        expected: int = 0,
        keep: int = 0,
        prompt_tokens: int | None = None,
        drafter: Drafter | None = None,
        on_error: Callable[[Answer, BaseException], None] | None = None,
    ) -> None:
        self._session = backend.start(rows=rows, expected=expected)
        if drafter is not None and not self._session.cuts:
            self._session.close()
            raise UnsupportedError(
                "this model's layers carry a state that cannot be cut back, so guessed tokens could not be taken back; "
                "write without a draft"
            )
        self._rows: dict[Answer, int | None] = {}  # None: not begun
        self._kept: OrderedDict[int, list[int]] = OrderedDict()  # row -> its tokens, least recently used first
        self._keep = keep
        self._prompt_tokens = prompt_tokens
        self._drafter = drafter
        self._on_error = on_error
        self.counts = Counts()

    def __len__(self) -> int:
        """Answers that are being written."""
        return len(self._rows)

    @property
    def kept_tokens(self) -> int:
        """Tokens of finished rows that are kept."""
        return sum(map(len, self._kept.values()))

    @property
    def used_tokens(self) -> int:
        """Tokens in the cache, of answers and of kept rows."""
        live = [row for row in self._rows.values() if row is not None]
        return self.kept_tokens + sum(self._session.length(row) for row in live)

    def admit(self, answer: Answer) -> None:
        """Take an answer in; it begins with the next advance."""
        self._rows[answer] = None

    def remove(self, answer: Answer) -> None:
        """Stop an answer, finished or not; what it has read and written may serve others."""
        row = self._rows.pop(answer)
        if row is not None:
            self._retire(row, answer)

    def advance(self) -> list[tuple[Answer, Piece]]:
        """Read some of the prompts, write a token of every answer that is ready; finished answers leave.

        Returns:
            What was written; an answer may come several times, or not at all.
        """
        if not self._rows:
            return []
        found = list(self._drafted() or self._together())
        for answer, piece in found:
            self.counts.written += 1
            if piece.finished is not None:
                self.remove(answer)
        return found

    def close(self) -> None:
        """Give the cache back."""
        self._rows.clear()
        self._kept.clear()
        self._session.close()

    def _together(self) -> Iterator[tuple[Answer, Piece]]:
        new = self._chosen()
        if not new:
            return
        logits = self._session.extend({row: tokens for _, row, tokens in new})
        self.counts.runs += 1
        for (answer, row, _), values in zip(new, logits, strict=True):
            if self._pending(answer, row) == 0 and (piece := self._taken(answer, values)) is not None:
                yield answer, piece

    def _taken(self, answer: Answer, values: Floats) -> Piece | None:
        """The next token of an answer; None where it cannot go on, which its fellows do not notice."""
        try:
            return answer.take(values)
        except BaseException as error:  # libraries in other languages panic as one
            if self._on_error is None:
                raise
            self.remove(answer)
            self._on_error(answer, error)
            return None

    def _chosen(self) -> list[tuple[Answer, int, list[int]]]:
        """Answers that take part in the next run, their rows, and the tokens that each is to read."""
        new = [
            (a, row, a.tokens[-1:]) for a, row in self._rows.items() if row is not None and self._pending(a, row) == 1
        ]
        if len(new) == len(self._rows):
            return new
        budget = self._prompt_tokens
        if budget is not None and not new:
            budget *= 2
        reading: list[list[int]] = []
        for answer, begun in list(self._rows.items()):
            if begun is not None and self._pending(answer, begun) == 1:
                continue
            if budget == 0:
                break
            if begun is None and any(common(answer.tokens, other) >= SHARED for other in reading):
                continue  # a twin: it gets a copy once the other has been read
            row = self._begin(answer) if begun is None else begun
            tokens = answer.tokens[self._session.length(row) :][:budget]
            budget = None if budget is None else budget - len(tokens)
            self.counts.read += len(tokens)
            new.append((answer, row, tokens))
            reading.append(answer.tokens)
        return new

    def _drafted(self) -> list[tuple[Answer, Piece]] | None:
        """Several tokens of the only answer; None if that is not how it goes on."""
        if self._drafter is None or len(self._rows) != 1:
            return None
        [(answer, row)] = self._rows.items()
        if row is None or self._pending(answer, row) != 1 or answer.room < 2:
            return None
        guess = list(self._drafter.guess(answer.tokens, answer.room - 1))
        if not guess:
            return None
        found = []
        for place, values in enumerate(self._session.scores(row, [answer.tokens[-1], *guess])):
            piece = answer.take(values)
            found.append((answer, piece))
            if piece.finished is not None or place == len(guess) or piece.choice.token != guess[place]:
                break
        self._session.cut(row, len(answer.tokens) - 1)
        self.counts.runs += 1
        self.counts.guessed += len(guess)
        self.counts.accepted += len(found) - 1
        return found

    def _pending(self, answer: Answer, row: int) -> int:
        return len(answer.tokens) - self._session.length(row)

    def _begin(self, answer: Answer) -> int:
        """A row for an answer, with as much of its prompt as the session holds somewhere; never all of it."""
        most = len(answer.tokens) - 1
        live = [(row, a.tokens[: self._session.length(row)]) for a, row in self._rows.items() if row is not None]
        best, source = 0, None
        for row, tokens in [*self._kept.items(), *live]:
            same = min(common(answer.tokens, tokens), most)
            if same > best and (same := self._session.reach(row, same)) > best:
                best, source = same, row
        if source is None or best < SHARED:
            [row] = self._session.add()
        elif source in self._kept and best >= _TAKEN * len(self._kept[source]):
            row = source
            del self._kept[source]
            self._session.cut(row, best)
        else:
            row = self._session.fork(source, best)
            if source in self._kept:
                self._kept.move_to_end(source)
        self._rows[answer] = row
        answer.reused = self._session.length(row)
        self.counts.reused += answer.reused
        return row

    def _retire(self, row: int, answer: Answer) -> None:
        length = self._session.length(row)
        if self._keep < length or length < SHARED:
            self._session.drop(row)
            return
        self._kept[row] = answer.tokens[:length]
        while self.kept_tokens > self._keep or len(self._kept) > KEPT_ROWS:
            old, _ = self._kept.popitem(last=False)
            self._session.drop(old)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two rows begin with alike; whole stretches are compared first, which is far faster."""
    same, width = 0, min(len(one), len(other))
    while same < width and one[same : same + _STRETCH] == other[same : same + _STRETCH]:
        same += _STRETCH
    while same < width and one[same] == other[same]:
        same += 1
    return min(same, width)
