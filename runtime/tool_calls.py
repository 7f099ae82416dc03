r"""Calls of tools in a model's text: which notation a package's chat template teaches, and how to read it.

    hermes         <tool_call>{"name": …, "arguments": {…}}</tool_call>             Hermes, Qwen 2.5 and 3, SmolLM3
    llama3         {"name": …, "parameters": {…}} on its own line, or behind <|python_tag|>   Llama 3.1, 3.2, 3.3
    mistral        [TOOL_CALLS][{"name": …, "arguments": {…}}, …]                   Mistral's tokenizers to version 7
    mistral-args   [TOOL_CALLS]name[ARGS]{…}, several in a row                      from version 11

The text of an answer is what stands outside of calls, without the white space around them.  What looks like a call and
is not one (no name, broken JSON, cut off in the middle) stays text, so that nothing a model wrote is lost.  A stream
holds back what may be the beginning of a call until that is decided; its pieces joined are the text of the whole.

Some packages have these marks as special tokens, which have no text unless `GenerationSettings.show` names them; give
it `ToolFormat.marks`.

Source: the chat templates of these models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from roundexport.errors import UsageError
from roundexport.storage.strict_json import too_deep

from .settings import Grammar

_SPACE = re.compile(r"\s*")
_BETWEEN = re.compile(r"[\s;]*")  # calls
_JSON_PART = re.compile(r'"(?:[^"\\]|\\.)*"|["{}\[\]]', re.DOTALL)
_NAMED = re.compile(r"([\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]\s*(?=\{)")
_NAMED_BEGUN = re.compile(r"[\w.-]*(?:\[[\w\]\[]*\s*)?")
_DECIDING = re.compile(r"[]}]")  # JSON ends with one of these


@dataclass(frozen=True)
class ToolCall:
    """One call.

    Args:
        name: the tool's.
        arguments: a JSON object, as text.
    """

    name: str
    arguments: str


@dataclass(frozen=True)
class _Found:
    """Calls that stand somewhere, and where they end."""

    calls: list[ToolCall]
    end: int


class _UndecidedError(Exception):
    """More text decides.

    Args:
        inside: of JSON, whose end alone does.
    """

    def __init__(self, inside: bool = False) -> None:
        super().__init__()
        self.inside = inside


@dataclass(frozen=True)
class ToolFormat:
    """A notation of calls.

    Args:
        name: see above.
        marks: texts that a package may have as special tokens.
        begins: matches where a call may begin.
        openings: what such a place begins with.
        read: the calls at a place of a text, None if there are none; told whether that is all the text.
        forced: one call of a name with arguments by a rule, in llguidance's notation.
    """

    name: str
    marks: tuple[str, ...]
    begins: re.Pattern[str]
    openings: tuple[str, ...]
    read: Callable[[str, int, bool], _Found | None]
    forced: tuple[str, str]

    def parse(self, text: str) -> tuple[str, list[ToolCall]]:
        """The text outside of calls, and the calls."""
        stream = self.stream()
        first = stream.push(text)
        rest, calls = stream.finish()
        return first + rest, calls

    def stream(self) -> ToolStream:
        """A parser for text that comes in pieces."""
        return ToolStream(self)

    def grammar(self, tools: Sequence[Mapping[str, Any]], name: str | None = None) -> Grammar:
        """What an answer looks like that is one call and nothing else.

        Args:
            tools: ``{"type": "function", "function": {"name": …, "parameters": JSON schema}}``, or what is inside.
            name: the tool to call; None: any of them.

        Raises:
            UsageError: none of the tools has that name.
        """
        functions: list[Mapping[str, Any]] = [tool.get("function", tool) for tool in tools]
        chosen = [function for function in functions if name in (None, function["name"])]
        if not chosen:
            raise UsageError(f"no tool is called {name!r}; there are {[f['name'] for f in functions]}")
        rules = [f"start: {' | '.join(f'call{i}' for i in range(len(chosen)))}"]
        before, behind = self.forced
        for i, function in enumerate(chosen):
            named = before.replace("NAME", _text(function["name"])[1:-1])
            rules.append(f"call{i}: {_text(named)} args{i} {_text(behind) if behind else ''}")
            schema = {"type": "object", **(function.get("parameters") or {})}
            rules.append(f"args{i}: %json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': ' ?'}})}")
        return Grammar("lark", "\n".join(rules) + "\n")


class ToolStream:
    """Reads a text that comes in pieces.

    Args:
        format: the notation.
    """

    def __init__(self, format: ToolFormat) -> None:
        self._format = format
        self._text = ""
        self._at = 0  # what stands before is shown, or a call
        self._inside = False  # a call has begun here
        self._before = ""  # white space before the calls here
        self._behind = False  # calls end here
        self._shown = False
        self._calls: list[ToolCall] = []

    def push(self, text: str) -> str:
        """Text that is certainly not part of a call."""
        self._text += text
        if self._inside and not _DECIDING.search(text):
            return ""
        return self._read(final=False)

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest of the text, and all calls."""
        rest = self._read(final=True)
        return rest if self._calls else rest + self._text[self._at :], self._calls

    def _read(self, *, final: bool) -> str:
        shown, self._inside = "", False
        while (place := self._format.begins.search(self._text, self._at)) is not None:
            shown += self._show(place.start())
            try:
                found = self._format.read(self._text, place.start(), final)
            except _UndecidedError as undecided:
                self._inside = undecided.inside
                return shown
            if found is None:
                shown += self._show(place.end())
                continue
            self._before = self._before or (self._text[self._at : place.start()] if self._shown else "")
            self._calls += found.calls
            self._at, self._behind = found.end, True
        if self._behind and _BETWEEN.fullmatch(self._text, self._at):
            return shown
        keep = 0 if final else max(_overlap(self._text[self._at :], opening) for opening in self._format.openings)
        return shown + self._show(len(self._text) - keep)

    def _show(self, end: int) -> str:
        """The text up to a place; white space at its end stays where it is."""
        text = self._text[self._at : end].rstrip()
        if not text:
            return ""
        self._at += len(text)
        if self._behind:
            text = self._before + text.lstrip()
        self._before, self._behind, self._shown = "", False, True
        return text


def _read_hermes(text: str, at: int, final: bool) -> _Found | None:
    at, calls = at + len(_HERMES), []
    while True:
        at = _skip(text, at)
        if text.startswith("{", at):
            value, at = _json(text, at, final)
            call = _call(value)
            if call is None:
                return None
            calls.append(call)
        elif text.startswith(_HERMES_END, at) and calls:
            return _Found(calls, at + len(_HERMES_END))
        elif not final and _HERMES_END.startswith(text[at:]):
            raise _UndecidedError
        else:
            return _Found(calls, at) if calls else None


def _read_llama(text: str, at: int, final: bool) -> _Found | None:
    calls: list[ToolCall] = []
    end = at + len(_PYTHON) if text.startswith(_PYTHON, at) else at
    while True:
        at = _BETWEEN.match(text, end).end()  # type: ignore[union-attr]
        if at == len(text) and not final:
            raise _UndecidedError
        value, at = _json(text, at, final) if text.startswith("{", at) else (None, at)
        known = isinstance(value, dict) and value.keys() & {"parameters", "arguments", "function"}
        call = _call(value) if known else None
        if call is None:
            return _Found(calls, end) if calls else None
        calls.append(call)
        end = at


def _read_mistral(text: str, at: int, final: bool) -> _Found | None:
    at = _skip(text, at + len(_MISTRAL) if text.startswith(_MISTRAL, at) else at)
    if text.startswith("[", at):
        value, end = _json(text, at, final)
        calls = [_call(each) for each in value] if isinstance(value, list) else []
        found = [call for call in calls if call is not None]
        return _Found(found, end) if found and len(found) == len(calls) else None
    if named := _NAMED.match(text, at):
        value, end = _json(text, named.end(), final)
        call = _call({"name": named[1], "arguments": value})
        return None if call is None else _Found([call], end)
    if not final and _NAMED_BEGUN.fullmatch(text, at):
        raise _UndecidedError
    return None


def _json(text: str, at: int, final: bool) -> tuple[Any, int]:
    """The object or list that begins here and its end; None where it is broken."""
    depth = 0
    for part in _JSON_PART.finditer(text, at):
        if part[0] == '"':
            break  # a string without an end
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(part[0], 0)
        if depth == 0:
            return _parsed(text[at : part.end()]), part.end()
    if not final:
        raise _UndecidedError(inside=True)
    return None, len(text)


def _parsed(text: str) -> Any:
    """The value of a JSON text; None where it is broken or nested deeper than any tool's arguments."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    return None if too_deep(value) else value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _call(value: Any) -> ToolCall | None:
    """A call from its JSON; None if it is not one."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _parsed(arguments)
    if not (isinstance(name, str) and name.strip() and isinstance(arguments, dict)):
        return None
    return ToolCall(name, _text(arguments))


def _text(value: Any) -> str:
    """JSON; characters as they are unless UTF-8 cannot write them."""
    text = json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if re.search("[\ud800-\udfff]", text) else text


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _overlap(text: str, opening: str) -> int:
    """Characters at the end of ``text`` that may be the beginning of ``opening``."""
    return next((n for n in range(min(len(text), len(opening) - 1), 0, -1) if text.endswith(opening[:n])), 0)


_HERMES, _HERMES_END, _PYTHON, _MISTRAL = "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]"
_MISTRAL_MARKS = (_MISTRAL, "[ARGS]", "[CALL_ID]")
_MISTRAL_BEGINS = re.compile(r"\[TOOL_CALLS\]|\A\s*\[\{")  # without the mark where it has no text
FORMATS = (
    ToolFormat(
        "hermes", (_HERMES, _HERMES_END), re.compile(_HERMES), (_HERMES,), _read_hermes,
        (_HERMES + '\n{"name": "NAME", "arguments": ', "}\n" + _HERMES_END),
    ),
    ToolFormat(
        "llama3", (_PYTHON,), re.compile(r"<\|python_tag\|>|(?<![^\n])[ \t]*\{"), (_PYTHON,),
        _read_llama, ('{"name": "NAME", "parameters": ', "}"),
    ),
    ToolFormat(
        "mistral", _MISTRAL_MARKS, _MISTRAL_BEGINS, (_MISTRAL, "[{"), _read_mistral,
        (_MISTRAL + '[{"name": "NAME", "arguments": ', "}]"),
    ),
    ToolFormat(
        "mistral-args", _MISTRAL_MARKS, _MISTRAL_BEGINS, (_MISTRAL, "[{"), _read_mistral,
        (_MISTRAL + "NAME[ARGS]", ""),
    ),
)  # fmt: skip
_BY_NAME = {format.name: format for format in FORMATS}
_OTHERS = ("<function=", "<arg_key>")  # other notations inside Hermes' marks: Qwen3-Coder, GLM


def format_of(template_source: str) -> ToolFormat | None:
    """The notation that a chat template teaches; None: one that is not known here, or none at all."""
    if _MISTRAL in template_source:
        return _BY_NAME["mistral-args" if "[ARGS]" in template_source else "mistral"]
    if _HERMES in template_source:
        return None if any(other in template_source for other in _OTHERS) else _BY_NAME["hermes"]
    if _PYTHON in template_source or ("<|start_header_id|>" in template_source and '"parameters"' in template_source):
        return _BY_NAME["llama3"]
    return None
