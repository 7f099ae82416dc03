"""Vectors of tokens for a decoder's graph that reads vectors: of its table, and of pictures that stand among them.

    id < vocabulary      a row of the table of tokens, by a graph of its own
    id ≥ vocabulary      a row of a picture's features, by the number that `add` gave it

So a prompt with pictures is a list of numbers like any other: sessions, batches, caches of prompts and the server treat
it as they treat text, and the same picture has the same numbers, by which its prompt is found in a cache.

Where a model has more for a picture than a vector (DeepStack), its rows are wider than a token's, behind which zeros
stand.

Features are kept while they fit into `_BYTES`, those looked at last, and beyond that while somebody holds them (a
prompt that waits, or whose answer is written).  A row of a picture that has gone is refused.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from roundexport.errors import UsageError

from .types import Floats, Ids

_BYTES = 256 << 20


Grid = tuple[int, int]
"""Rows and columns of a picture's features."""


@dataclass(frozen=True)
class _Picture:
    """The number of its first row, its features [T, W], and how they lie where that matters."""

    start: int
    features: Floats
    grid: Grid


class TokenRows:
    """What turns numbers into vectors; may be used by several threads.

    Args:
        lookup: rows [B, S, H] of token ids [B, S].
        vocabulary: the first number that is not a token.
        width: of a row; None: that of a token's vector.
        most: bytes of features to keep.
    """

    def __init__(
        self, lookup: Callable[[Ids], Floats], vocabulary: int, width: int | None = None, most: int = _BYTES
    ) -> None:
        self._lookup, self.vocabulary, self._width, self._most = lookup, vocabulary, width, most
        self._known: OrderedDict[Hashable, _Picture] = OrderedDict()
        self._holders: Counter[Hashable] = Counter()
        self._next = vocabulary
        self._lock = threading.Lock()

    def __call__(self, ids: Ids) -> Floats:
        """Vectors [B, S, W].

        Raises:
            UsageError: a row of a picture that is not kept any more.
        """
        foreign = ids >= self.vocabulary
        if not foreign.any():
            return self._wide(self._lookup(ids))
        found = self._wide(np.array(self._lookup(np.where(foreign, 0, ids))))
        with self._lock:
            for one in self._known.values():
                here = (ids >= one.start) & (ids < one.start + len(one.features))
                found[here] = one.features[ids[here] - one.start]
                foreign &= ~here
        if foreign.any():
            raise _gone()
        return found

    def _wide(self, rows: Floats) -> Floats:
        if self._width in (None, rows.shape[-1]):
            return rows
        found = np.zeros((*rows.shape[:-1], self._width), np.float32)
        found[..., : rows.shape[-1]] = rows
        return found

    def picture(self, number: int) -> tuple[int, Grid] | None:
        """First number and grid of the picture that a number is a row of; None of a token.

        Raises:
            UsageError: the picture is not kept any more.
        """
        if number < self.vocabulary:
            return None
        with self._lock:
            for one in self._known.values():
                if one.start <= number < one.start + len(one.features):
                    return one.start, one.grid
        raise _gone()

    @property
    def end(self) -> int:
        """The first number that no picture has yet."""
        return self._next

    def numbers(self, key: Hashable) -> range | None:
        """The numbers of a picture's rows; None where it is not known."""
        with self._lock:
            if key not in self._known:
                return None
            self._known.move_to_end(key)
            one = self._known[key]
            return range(one.start, one.start + len(one.features))

    def add(self, key: Hashable, features: Floats, grid: Grid | None = None) -> range:
        """Keep a picture's features [T, W], which lie in a grid where that matters; returns the numbers of its rows."""
        if (known := self.numbers(key)) is not None:
            return known
        with self._lock:
            start, self._next = self._next, self._next + len(features)
            self._known[key] = _Picture(start, features, grid or (1, len(features)))
            self._make_room()
        return range(start, start + len(features))

    def hold(self, ids: Sequence[int]) -> Callable[[], None]:
        """Keep the pictures of a prompt until the function that is returned is called.

        Raises:
            UsageError: one is not kept any more.
        """
        numbers = np.array([number for number in ids if number >= self.vocabulary], np.int64)
        with self._lock:
            held = []
            for key, one in self._known.items():
                here = (numbers >= one.start) & (numbers < one.start + len(one.features))
                if here.any():
                    held.append(key)
                    numbers = numbers[~here]
            if len(numbers):
                raise _gone()
            self._holders.update(held)

        def release() -> None:
            with self._lock:
                self._holders.subtract(held)
                self._holders = +self._holders
                self._make_room()

        return release

    def _make_room(self) -> None:
        """Let those go that were not looked at for longest, and that nobody holds; the last one stays."""
        size = sum(one.features.nbytes for one in self._known.values())
        for key in [key for key in list(self._known)[:-1] if key not in self._holders]:
            if size <= self._most:
                return
            size -= self._known.pop(key).features.nbytes


def _gone() -> UsageError:
    return UsageError("a picture of this prompt is not kept any more; send the prompt again")
