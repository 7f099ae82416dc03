"""What every engine's session asks of its rows, in the same words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from roundexport.errors import UsageError


def check_new(new: Mapping[int, Sequence[int]], length: Callable[[int], int], max_context: int) -> None:
    """Refuse to extend rows that get nothing, or that grow too long.

    Args:
        new: row -> tokens it is to get.
        length: tokens that a row has.
        max_context: most tokens of a row.

    Raises:
        UsageError: no row, a row without a token, or one that would exceed ``max_context``.
    """
    if not new:
        raise UsageError("no row was given to extend")
    for row, tokens in new.items():
        has, gets = length(row), len(tokens)
        if gets < 1:
            raise UsageError(f"row {row} gets no token")
        if has + gets > max_context:
            raise UsageError(f"{has + gets} tokens exceed this package's max_context of {max_context}")


def unknown_row(row: int) -> UsageError:
    """The error about a row that was never added, or was dropped."""
    return UsageError(f"the session has no row {row}; it was never added, or was dropped")


class Closing:
    """What a session is in a ``with`` block: closed at its end."""

    def close(self) -> None:
        """Give the cache back."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
