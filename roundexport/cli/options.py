"""The fields of `TuneSettings` as options of a command: one list of flags for every verb that tunes.

A verb decorated with :func:`takes_settings` has a parameter ``settings``; on the command line that parameter becomes
one option per field.  A flag is its field's name with dashes; its help, and how it is written where that is special,
are the field's own (tuning/setting_field.py).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from roundexport.environment.threads import VARIABLE, choose_threads
from roundexport.progress import Progress
from roundexport.tuning.setting_field import Described, described
from roundexport.tuning.settings import TuneSettings


def takes_settings(verb: Callable[..., None]) -> Callable[..., None]:
    """Turn a verb's parameter ``settings`` into one option per field of :class:`TuneSettings`."""
    return takes_settings_but()(verb)


def takes_settings_but(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """:func:`takes_settings` without some fields, which keep their defaults."""
    return functools.partial(_with_options, left_out)


def _with_options(left_out: tuple[str, ...], verb: Callable[..., None]) -> Callable[..., None]:
    fields = {name: found for name, found in described(TuneSettings).items() if name not in left_out}

    @functools.wraps(verb)
    def command(*args: Any, **options: Any) -> None:
        given = {}
        for name, (_, about) in fields.items():
            value = options.pop(name)
            given[name] = value if about.read is None else about.read(value, f"--{name.replace('_', '-')}")
        verb(*args, settings=TuneSettings(**given), **options)

    hints = get_type_hints(verb, include_extras=True)
    parameters = []
    for parameter in inspect.signature(verb).parameters.values():
        if parameter.name == "settings":
            parameters += _options(fields)
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _options(fields: dict[str, tuple[dataclasses.Field[Any], Described]]) -> list[inspect.Parameter]:
    hints, found = get_type_hints(TuneSettings), []
    for name, (field, about) in fields.items():
        as_is = about.read is None
        kind: Any = Annotated[hints[name] if as_is else str, typer.Option(*about.flags, help=about.help)]
        default = field.default if as_is else about.written(field.default)
        found.append(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind))
    return found


def tell_threads(shown: Progress) -> None:
    """Say how many threads will compute, and why."""
    shown.say(f"computing with {choose_threads()}")


def set_threads(count: int | None) -> None:
    """Compute with so many threads: as if OMP_NUM_THREADS were set, which torch and its libraries read at their start.

    Raises:
        UsageError: not a number of threads that this machine could use.
    """
    if count is not None:
        os.environ[VARIABLE] = str(choose_threads(count).count)
