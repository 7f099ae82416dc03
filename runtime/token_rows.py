"""Vectors of tokens for a decoder's graph that reads vectors: of its table, and of pictures that stand among them.

    id < vocabulary      a row of the table of tokens, by a graph of its own
    id ≥ vocabulary      a row of a picture's features, by the number that `add` gave it

So a prompt with pictures is a list of numbers like any other: sessions, batches, caches of prompts and the server treat
it as they treat text, and the same picture has the same numbers, by which its prompt is found in a cache.

Features are kept while they fit into `_BYTES`, those looked at last; a row of a picture that has gone is refused.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np

from roundexport.errors import UsageError

from .types import Floats, Ids

_BYTES = 256 << 20


class TokenRows:
    """What turns numbers into vectors; may be used by several threads.

    Args:
        lookup: rows [B, S, H] of token ids [B, S].
        vocabulary: the first number that is not a token.
        most: bytes of features to keep.
    """

    def __init__(self, lookup: Callable[[Ids], Floats], vocabulary: int, most: int = _BYTES) -> None:
        self._lookup, self.vocabulary, self._most = lookup, vocabulary, most
        self._known: OrderedDict[Hashable, tuple[int, Floats]] = OrderedDict()
        self._next = vocabulary
        self._lock = threading.Lock()

    def __call__(self, ids: Ids) -> Floats:
        """Vectors [B, S, H].

        Raises:
            UsageError: a row of a picture that is not kept any more.
        """
        foreign = ids >= self.vocabulary
        if not foreign.any():
            return self._lookup(ids)
        found = np.array(self._lookup(np.where(foreign, 0, ids)))
        with self._lock:
            for start, features in self._known.values():
                here = (ids >= start) & (ids < start + len(features))
                found[here] = features[ids[here] - start]
                foreign &= ~here
        if foreign.any():
            raise UsageError("a picture of this prompt is not kept any more; send the prompt again")
        return found

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
            start, features = self._known[key]
            return range(start, start + len(features))

    def add(self, key: Hashable, features: Floats) -> range:
        """Keep a picture's features [T, H]; returns the numbers of its rows."""
        if (known := self.numbers(key)) is not None:
            return known
        with self._lock:
            start, self._next = self._next, self._next + len(features)
            self._known[key] = start, features
            while len(self._known) > 1 and sum(rows.nbytes for _, rows in self._known.values()) > self._most:
                self._known.popitem(last=False)
        return range(start, start + len(features))
