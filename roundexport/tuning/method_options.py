"""A method's own settings, from text: `--method-settings end_to_end.window=2,gram.keep_size=false`.

Every file of algorithms/ has a dataclass of settings; most fields have a default chosen by measurement and no option of
their own.  Each can be set here by the names of its file and its field.  The text is read as what the field is declared
to be: a number, a whole number, true or false, one of some words, or none.

The method itself refuses values that make no sense.  Fields with an option of their own (steps, batch_size) are taken
from there unless named here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from roundexport.algorithms.interface import MethodSettings, ModelTransformSettings
from roundexport.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from .settings import TuneSettings

S = TypeVar("S", bound=MethodSettings | ModelTransformSettings)

_WORDS = {"true": True, "false": False}


def check_names(assignments: Sequence[str], methods: Sequence[str]) -> None:
    """Refuse assignments to methods that do not run.

    Raises:
        UsageError: text of another form, or a method that takes no part in the run.
    """
    for text in assignments:
        name = _split(text)[0]
        if name not in methods:
            raise UsageError(f"method_settings {text!r}: {name} takes no part in this run; {', '.join(methods)} do")


def settings_of(name: str, kind: type[S], settings: TuneSettings) -> S:
    """A method's settings, with what the user gave for the fields it has.

    Args:
        name: the method's.
        kind: class of its settings.
        settings: of the run; ``method_settings`` come before ``steps`` and ``batch_size``.

    Raises:
        UsageError: no such field, or a value that makes no sense.
    """
    given = {"steps": settings.steps, "batch_size": settings.batch_size}
    fields = {field.name for field in dataclasses.fields(kind)}
    own = {field: value for field, value in given.items() if field in fields and value is not None}
    return kind(**{**own, **assigned(name, kind, settings.method_settings)})


def assigned(own: str, kind: type[DataclassInstance], assignments: Sequence[str]) -> dict[str, Any]:
    """Values by field of a method's settings.

    Args:
        own: the method's name.
        kind: class of its settings.
        assignments: ``method.field=value`` each; those of other methods are passed over.

    Raises:
        UsageError: no such field, or a value of another kind.
    """
    found = {}
    hints = get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    for text in assignments:
        name, field, value = _split(text)
        if name != own:
            continue
        if field not in known:
            raise UsageError(f"method_settings {text!r}: {own} has no such setting; it has {', '.join(known)}")
        found[field] = _read(value, hints[field], text)
    return found


def _split(text: str) -> tuple[str, str, str]:
    place, equals, value = text.strip().partition("=")
    name, dot, field = place.partition(".")
    if not (equals and dot and name and field and value):
        raise UsageError(f"method_settings {text!r}: give method.field=value, as in end_to_end.window=2")
    return name, field, value


def _read(value: str, hint: Any, text: str) -> Any:
    """A value of the first of a hint's kinds that the text is one of."""
    kinds = (hint,) if get_origin(hint) is Literal or not get_args(hint) else get_args(hint)
    for kind in kinds:
        if get_origin(kind) is Literal:
            if value in get_args(kind):
                return value
        elif kind is NoneType:
            if value == "none":
                return None
        elif kind is bool:
            if value in _WORDS:
                return _WORDS[value]
        else:
            try:
                return kind(value)
            except ValueError:
                continue
    raise UsageError(f"method_settings {text!r}: {value!r} is none of {', '.join(_described(kind) for kind in kinds)}")


def _described(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", NoneType: "none"}
    return " or ".join(get_args(kind)) if get_origin(kind) is Literal else names[kind]
