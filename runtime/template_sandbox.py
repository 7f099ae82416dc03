"""The sandbox of chat templates: Jinja2's immutable one as transformers sets it up, with bounds on what it uses up.

Set-up as in transformers 5.23 (utils/chat_template_utils.py): blocks trimmed, loop controls, ``raise_exception``,
``strftime_now``, a ``tojson`` that keeps non-ASCII text, ``{% generation %}`` shown as plain text, no underscored
namespace fields.  A template is a stranger's program; Jinja2's sandbox keeps it from Python's internals, and here

    steps     turns of loops, calls and operators together; a nested ``range(99999)`` ends here        _STEPS
    time      of one rendering                                                                          _SECONDS
    texts     no text or list longer than this is made by ``*``, ``+``, ``~``, ``%`` or a macro        _LENGTH
    numbers   no result of ``*`` or ``**`` with more bits than this                                    _BITS
    arguments no whole number above this is handed to a function or filter (widths, counts)            _ARGUMENT

are bounded, before the work is done.

Source: https://jinja.palletsprojects.com/en/stable/sandbox/#operator-intercepting.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

_STEPS = 1_000_000
_SECONDS = 10.0
_LENGTH = 10_000_000
_BITS = 4096
_ARGUMENT = 1_000_000
_HARMLESS = {
    "count",
    "d",
    "default",
    "first",
    "items",
    "last",
    "length",
    "map",
    "reject",
    "rejectattr",
    "select",
    "selectattr",
}
_SOURCE = 1_000_000  # characters of a template; the longest in use have some 30,000
_PRODUCT = 100  # replace and join may in theory make texts as long as the product of their arguments, and hardly do
_WIDE_FIELD = re.compile(r"\{[^}]*:[^}]*\d{7,}")
_WIDE = re.compile(r"\d{7,}|\*")  # a width in a format, or one that comes with the arguments


class _TooMuchError(Exception):
    """A template wants more than it may use."""


class _Budget:
    """The steps that one rendering has taken, and when it has to be done."""

    def __init__(self) -> None:
        self._steps = 0
        self._made = 0
        self._end = time.monotonic() + _SECONDS

    def step(self) -> None:
        self._steps += 1
        if self._steps > _STEPS:
            raise _TooMuchError(f"it takes more than {_STEPS:,} steps")
        if time.monotonic() > self._end:
            raise _TooMuchError(f"it takes longer than {_SECONDS:g} seconds")

    def spend(self, length: int) -> None:
        self._made += length
        if self._made > 10 * _LENGTH:
            raise _TooMuchError(f"its functions make more than {10 * _LENGTH:,} characters")


class _Context(Context):
    """A rendering's variables, and what it may still use up."""

    budget: _Budget  # shared by the contexts that are derived from the first

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.budget = _Budget()

    def derived(self, locals: dict[str, Any] | None = None) -> Context:
        made = super().derived(locals)
        assert isinstance(made, _Context)
        made.budget = self.budget
        return made


class _CodeGenerator(CodeGenerator):
    """Python for templates, in which ``~`` and the turns of loops are counted."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802  (jinja2's name)
        self.write("environment.join_texts((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with its bounds."""

    intercepted_binops = frozenset(("*", "**", "+", "%", "//", "/", "-"))
    context_class = _Context
    code_generator_class = _CodeGenerator

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """``left operator right``, refused before it is computed where the result would be too large."""
        _step(context)
        check = _CHECKS.get(operator)
        if check is not None:
            check(left, right)
        return self.binop_table[operator](left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """A call from the template, counted."""
        _step(__context)
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        _check_arguments(getattr(method, "__self__", None), args, kwargs)
        return _made(__context, super().call(__context, __obj, *args, **kwargs))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The template's tree, in which every loop goes over `_Counted`."""
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            marks = {"lineno": loop.lineno, "environment": self}
            loop.iter = nodes.Filter(loop.iter, "counted_turns", [], [], None, None, **marks)
        return tree

    def join_texts(self, parts: Iterable[Any]) -> str:
        """``a ~ b``."""
        return join(str(_checked(part)) for part in parts)

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """The text of a macro, or of a block that is assigned."""
        return join(parts)


def _step(context: Context) -> None:
    if isinstance(context, _Context):
        context.budget.step()


def _made(context: Context, value: Any) -> Any:
    """A function's result, its length paid for."""
    if isinstance(value, str | bytes | list | tuple):
        _check_length(len(value))
        if isinstance(context, _Context):
            context.budget.spend(len(value))
    return value


def _size(value: Any, counted: int = 0) -> int:
    """Characters and elements of a value, those inside it too, added to ``counted``; ends soon above the bound."""
    if isinstance(value, str | bytes):
        return counted + len(value)
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        for item in value:
            counted = _size(item, counted + 8)
            if counted > _LENGTH:
                break
    return counted


def _check_times(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    for sized, count in ((left, right), (right, left)):
        if _size(sized) and isinstance(count, int):
            _check_length(_size(sized) * count)


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * max(right, 0))


def _check_plus(left: Any, right: Any) -> None:
    _check_length(_size(left) + _size(right))


def _check_percent(left: Any, right: Any) -> None:
    if isinstance(left, str) and _WIDE.search(left):
        raise _TooMuchError("it formats a text to an absurd width")


_CHECKS: dict[str, Callable[[Any, Any], None]] = {
    "*": _check_times, "**": _check_power, "+": _check_plus, "%": _check_percent,
}  # fmt: skip


def _check_bits(bits: int) -> None:
    if bits > _BITS:
        raise _TooMuchError(f"it computes a number of more than {_BITS} bits")


def _check_length(length: int) -> None:
    if length > _LENGTH:
        raise _TooMuchError(f"it makes a text or list longer than {_LENGTH:,}")


def _check_arguments(receiver: Any, args: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Refuse absurd widths and counts, and products of long texts (``replace``, ``join``), before a function runs."""
    given = [*args, *options.values()]
    if any(isinstance(value, int) and abs(value) > _ARGUMENT for value in given):
        raise _TooMuchError(f"it hands a number above {_ARGUMENT:,} to a function")
    if isinstance(receiver, str) and _WIDE_FIELD.search(receiver):
        raise _TooMuchError("it formats a text to an absurd width")
    sizes = [max(1, _size(value)) for value in (receiver, *given)]
    for size in sizes:
        _check_length(size)
    _check_length(math.prod(sizes) // _PRODUCT)


def _checked(value: Any) -> Any:
    _check_length(_size(value))
    return value


def join(parts: Iterable[str]) -> str:
    """Texts joined, as long as the result is within the bound."""
    found: list[str] = []
    length = 0
    for part in parts:
        length += len(part)
        _check_length(length)
        found.append(part)
    return "".join(found)


@jinja2.pass_context
def _counted_turns(context: Context, values: Iterable[Any]) -> Iterable[Any]:
    """What a loop goes over: unchanged, its turns paid for one by one."""
    return _Counted(context, values)


class _Counted:
    """An iterable whose every turn is a step; its length stays known, which ``loop.length`` asks for."""

    def __init__(self, context: Context, values: Iterable[Any]) -> None:
        self._context, self._values = context, values

    def __iter__(self) -> Iterator[Any]:
        for value in self._values:
            _step(self._context)
            yield value

    def __len__(self) -> int:
        # Of a generator this is a TypeError, which is what jinja2 expects.
        return len(self._values)  # type: ignore[arg-type]


class _GenerationTag(Extension):
    """``{% generation %} … {% endgeneration %}`` marks an assistant's text for training; here it only shows it."""

    tags = {"generation"}  # noqa: RUF012  (the name and type jinja2 asks for)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without underscored fields, as transformers has it."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace's fields may not begin with an underscore: {name!r}")
        super().__setitem__(name, value)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
            sort_keys: bool = False) -> str:  # fmt: skip
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter with the bounds of a call."""
    passed = getattr(function, "jinja_pass_arg", None)  # what jinja2 hands the filter first, beside its arguments

    @jinja2.pass_context
    def call(context: Context, *args: Any, **options: Any) -> Any:
        _step(context)
        if name not in _HARMLESS:
            _check_arguments(args[0], args[1:], options)
        if name == "format":
            _check_percent(args[0], None)
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        lead = () if passed is None else (first[passed.name],)
        return _made(context, function(*lead, *args, **options))

    return call


def compile_template(source: str) -> jinja2.Template:
    """A template that renders within the bounds; whatever it does wrong is some exception."""
    if len(source) > _SOURCE:
        raise _TooMuchError(f"it is longer than {_SOURCE:,} characters")
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
        finalize=_checked,
    )
    environment.filters["tojson"] = _tojson
    environment.filters = {name: _bounded(name, function) for name, function in environment.filters.items()}
    environment.filters["counted_turns"] = _counted_turns
    environment.globals |= {
        "raise_exception": _raise_exception, "strftime_now": _strftime_now, "namespace": _Namespace,
    }  # fmt: skip
    del environment.globals["lipsum"]  # filler text, of any length in one call
    return environment.from_string(source)
