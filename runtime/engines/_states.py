"""States that cannot be cut back: what a row's states were at some of its lengths, so that it can go on from there.

A cache of keys and values is cut back by forgetting its end.  The state of a short convolution or of linear attention
is a sum over all tokens so far; what it was earlier is known only where a copy was kept.  So a row goes on

    where it ends        its state as it is
    at a mark            a copy, kept at every `EVERY` tokens while a prompt is read in pieces
    at its beginning     zeros

and from nowhere else.  `reach` of a session says from where; whoever wants a longer beginning reads the rest again.
Copies are never written to, so forks share them.  A row keeps `MOST` of them; when there are more, every second goes,
and the last one stays.
"""

from __future__ import annotations

from collections.abc import Mapping

from roundexport.errors import UnsupportedError
from roundexport.runtime.types import Floats

EVERY = 256  # tokens; a prompt is read in pieces of so many, too
MOST = 8

Values = Mapping[str, Floats]


class Marks:
    """Copies of rows' states, by row and length."""

    def __init__(self) -> None:
        self._of: dict[int, dict[int, Values]] = {}

    def note(self, row: int, length: int, values: Values) -> None:
        """Keep what a row's states are at a length."""
        kept = self._of.setdefault(row, {})
        kept[length] = values
        if len(kept) > MOST:
            self._of[row] = {at: kept[at] for at in sorted(kept)[::-2]}

    def reach(self, row: int, now: int, length: int) -> int:
        """The longest beginning of a row of ``now`` tokens, of at most ``length``, from which it can go on."""
        if length >= now:
            return now
        return max((at for at in self._of.get(row, ()) if at <= length), default=0)

    def at(self, row: int, length: int) -> Values | None:
        """The states of a row at a mark; None at its beginning.

        Raises:
            UnsupportedError: there is no mark.
        """
        if length == 0:
            return None
        if length not in self._of.get(row, {}):
            raise UnsupportedError(
                f"row {row} cannot go on behind its first {length} tokens: the model carries a state that cannot be "
                "cut back; `reach` says from where a row can go on"
            )
        return self._of[row][length]

    def cut(self, row: int, length: int) -> None:
        """Forget marks beyond a length."""
        self._of[row] = {at: values for at, values in self._of.get(row, {}).items() if at <= length}

    def fork(self, source: int, made: int, length: int) -> None:
        """Give a new row the marks of another, as far as it goes."""
        self._of[made] = dict(self._of.get(source, {}))
        self.cut(made, length)

    def drop(self, row: int) -> None:
        """Forget a row."""
        self._of.pop(row, None)
