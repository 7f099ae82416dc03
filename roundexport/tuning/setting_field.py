"""A field of `TuneSettings` with its help beside it: one text for Python's ``help()`` and for the command line.

    bits: int = setting(4, "2, 3, 4 or 8.")

The command line (cli/options.py) makes an option of every field: its flag is the field's name with dashes, its type the
field's.  Where that is not enough the field says how it is written there: `read` turns the text into the value,
``flags`` replaces the flag, and ``unset`` is the word for None.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from roundexport.errors import UsageError

T = TypeVar("T")
_KEY = "roundexport"


@dataclass(frozen=True)
class Described:
    """What a field says of itself.

    Args:
        help: what it is for, as a sentence.
        read: (text, flag) -> value, where the command line takes a text; None: it takes the field's own type.
        flags: in place of the one that the name gives.
        unset: how None is written where there is a ``read``; a word that means something else is no such word.
    """

    help: str
    read: Callable[[str, str], Any] | None = None
    flags: tuple[str, ...] = ()
    unset: str = "none"

    def __post_init__(self) -> None:
        if not self.help.endswith("."):
            raise ValueError(f"help must be a sentence: {self.help!r}")

    def written(self, value: Any) -> str:
        """A value as the command line takes it."""
        if value is None:
            return self.unset
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()


def setting(
    default: Any,
    help: str,
    read: Callable[[str, str], Any] | None = None,
    flags: tuple[str, ...] = (),
    unset: str = "none",
) -> Any:
    """A dataclass field with a default and a description; see :class:`Described`."""
    return field(default=default, metadata={_KEY: Described(help, read, flags, unset)})


def described(owner: type) -> dict[str, tuple[dataclasses.Field[Any], Described]]:
    """Every field of a dataclass by name, with what it says of itself.

    Raises:
        KeyError: a field that was not made by :func:`setting`.
    """
    return {one.name: (one, one.metadata[_KEY]) for one in dataclasses.fields(owner)}


def documented(owner: type[T]) -> type[T]:
    """Put what the fields of a dataclass say of themselves into its docstring."""
    lines = [f"        {name}: {about.help}" for name, (_, about) in described(owner).items()]
    before, mark, after = (owner.__doc__ or "").partition("    Raises:")
    owner.__doc__ = f"{before}    Args:\n" + "\n".join(lines) + f"\n\n{mark}{after}"
    return owner


def none_or_int(text: str, flag: str) -> int | None:
    """A whole number, or none."""
    return None if text.lower() == "none" else _int(text, flag, " or none")


def auto_none_or_int(text: str, flag: str) -> int | str | None:
    """A whole number, none or auto."""
    return text if text == "auto" else none_or_int(text, flag)


def auto_plan_none_or_int(text: str, flag: str) -> int | str | None:
    """A whole number, none, auto or plan."""
    return text if text == "plan" else auto_none_or_int(text, flag)


def ints(text: str, flag: str) -> tuple[int, ...]:
    """Whole numbers between commas."""
    return tuple(_int(part, flag) for part in text.split(","))


def auto_or_group_sizes(text: str, flag: str) -> tuple[int | None, ...] | None:
    """Between commas whole numbers and none, which is a whole row; or auto, which asks for nothing."""
    return None if text.lower() == "auto" else tuple(none_or_int(part, flag) for part in text.split(","))


def texts(text: str, _flag: str) -> tuple[str, ...]:
    """Texts between commas, empty ones left out."""
    return tuple(part for part in text.split(",") if part)


def _int(text: str, flag: str, alternative: str = "") -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{flag} takes a whole number{alternative}, not {text!r}") from None
