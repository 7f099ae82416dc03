"""JSON read strictly: no duplicate keys, no NaN, no unknown or missing key, every value of the declared type.

A document's shape is declared once, as a frozen dataclass or a TypedDict, and `decode` holds what it reads against it:

    dataclass, TypedDict   object with exactly the declared keys
    tuple[X, ...]          array of X              tuple[X, Y]   array of exactly two
    dict[str, X]           object with any keys    Literal[...]  one of the values
    int, float, str, bool, None, X | Y             float takes whole numbers too; int takes no true/false
    Any                    any JSON value

What is read can be written again and takes bounded time and memory: at most 100 levels, at most so many values, and no
half of a surrogate pair.

`encode` writes sorted keys and no wall-clock detail, so equal documents are equal bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
import types
import typing
from collections import Counter
from typing import Any, Literal, NoReturn, TypeVar, Union, cast

from roundexport.errors import ArtifactError, SpecError

T = TypeVar("T")
MAX_DEPTH = 100
MAX_VALUES = 4_000_000  # some seconds and half a GiB
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def encode(document: Any) -> bytes:
    """A dataclass or JSON value as UTF-8 JSON: keys sorted, a final newline, a line for what holds no other object."""
    plain = dataclasses.asdict(document) if dataclasses.is_dataclass(document) else document  # type: ignore[arg-type]
    return (_text(plain, "\n") + "\n").encode()


def _text(value: Any, line: str) -> str:
    """JSON of a value; ``line``: a line break and the indent of the line that it begins in."""
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        raise TypeError(f"keys of JSON objects are strings, not {sorted(map(repr, value))[:3]}")
    inner = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if _is_array(value) else []
    if not any(isinstance(part, dict) or _is_array(part) for _, part in inner):
        return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    deeper = f"{line}  "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key, ensure_ascii=False)}: {_text(part, deeper)}" for key, part in sorted(inner)]
        return f"{{{deeper}{f',{deeper}'.join(parts)}{line}}}"
    return f"[{deeper}{f',{deeper}'.join(_text(part, deeper) for _, part in inner)}{line}]"


def _is_array(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def parse(data: bytes | str, where: str, most: int = MAX_VALUES) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        data: UTF-8 bytes or text.
        where: what is being read, for the error.
        most: values that it may hold, counted by their separators before anything is parsed.

    Raises:
        ArtifactError: not UTF-8, not JSON, not an object, a duplicate key, NaN or infinity, half of a surrogate pair,
            nested more than 100 deep, or more values than ``most``.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        values = sum(text.count(mark) for mark in ",[{")
        if values > most:
            raise ArtifactError(f"{where}: about {values} values, of which at most {most} are read")
        parsed = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ArtifactError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ArtifactError(f"{where}: expected a JSON object, found {_kind(parsed)}")
    if too_deep(parsed):
        raise ArtifactError(f"{where}: nested more than {MAX_DEPTH} deep")
    if _SURROGATE.search(text) and not _is_text(parsed):
        raise ArtifactError(f"{where}: a string holds half of a surrogate pair, which is not Unicode text")
    return parsed


def parse_format(data: bytes, known: str, where: str) -> dict[str, Any]:
    """Parse an object whose key ``format`` must be the one this version reads.

    Raises:
        ArtifactError: as :func:`parse`, or another format.
    """
    parsed = parse(data, where)
    found = parsed.get("format")
    if found != known:
        raise ArtifactError(f"{where}: its format is {found!r:.60}; this version of roundexport reads {known!r}")
    return parsed


def decode(shape: type[T], data: Any, where: str) -> T:
    """Hold parsed JSON against a declared shape.

    Args:
        shape: a dataclass or TypedDict.
        data: what :func:`parse` returned, or a part of it.
        where: path of the value, for the error, as in ``manifest.json: layers[3]``.

    Returns:
        An instance of ``shape``.

    Raises:
        ArtifactError: an unknown or missing key, or a value of another type; the text gives its place.
    """
    return cast(T, _decode(shape, data, where))


def _decode(shape: Any, data: Any, where: str) -> Any:
    origin = typing.get_origin(shape)
    if dataclasses.is_dataclass(shape) or typing.is_typeddict(shape):
        return _object(shape, data, where)
    if origin in (Union, types.UnionType):
        return _union(shape, data, where)
    if origin is tuple:
        return _array(typing.get_args(shape), data, where)
    if origin is dict:
        _expect(isinstance(data, dict), "an object", data, where)
        return {key: _decode(typing.get_args(shape)[1], value, f"{where}.{key}") for key, value in data.items()}
    return _scalar(shape, data, where)


def _object(shape: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), "an object", data, where)
    hints = _hints(shape)
    unknown, missing = sorted(set(data) - set(hints)), sorted(set(hints) - set(data))
    if unknown:
        raise ArtifactError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(hints))}")
    if missing:
        raise ArtifactError(f"{where}: key {missing[0]!r} is missing")
    values = {key: _decode(hint, data[key], f"{where}.{key}") for key, hint in hints.items()}
    try:
        return shape(**values)
    except SpecError as error:
        raise ArtifactError(f"{where}: {error}") from error


@functools.cache
def _hints(shape: Any) -> dict[str, Any]:
    """Types by key; Python compiles every annotation anew each time that it is asked, which is most of the reading."""
    return typing.get_type_hints(shape)


def _union(shape: Any, data: Any, where: str) -> Any:
    options = typing.get_args(shape)
    if data is None:
        _expect(types.NoneType in options, "a value", data, where)
        return None
    rest = [option for option in options if option is not types.NoneType]
    for option in rest[:-1]:
        try:
            return _decode(option, data, where)
        except ArtifactError:
            continue
    return _decode(rest[-1], data, where)


def _array(items: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    _expect(isinstance(data, list), "an array", data, where)
    if len(items) == 2 and items[1] is Ellipsis:
        items = (items[0],) * len(data)
    _expect(len(data) == len(items), f"an array of {len(items)}", data, where)
    return tuple(_decode(item, value, f"{where}[{i}]") for i, (item, value) in enumerate(zip(items, data, strict=True)))


def _scalar(shape: Any, data: Any, where: str) -> Any:
    if typing.get_origin(shape) is Literal:
        known = typing.get_args(shape)
        _expect(isinstance(data, str) and data in known, f"one of {', '.join(map(repr, known))}", data, where)
        return data
    if shape is float:
        _expect(isinstance(data, int | float) and not isinstance(data, bool), "a number", data, where)
        _expect(abs(data) <= sys.float_info.max, "a number", data, where)
        return float(data)
    if shape is Any:
        return data
    names = {int: "a whole number", str: "a string", bool: "true or false"}
    _expect(isinstance(data, shape) and (shape is bool or not isinstance(data, bool)), names[shape], data, where)
    return data


def _expect(condition: bool, wanted: str, data: Any, where: str) -> None:
    if not condition:
        raise ArtifactError(f"{where}: expected {wanted}, found {_kind(data)}")


def _kind(data: Any) -> str:
    if isinstance(data, dict):
        return "an object"
    return f"an array of {len(data)}" if isinstance(data, list) else repr(data)[:80]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} appears twice")
    return found


def too_deep(value: Any) -> bool:
    """Whether a parsed value has more than MAX_DEPTH levels of objects and arrays.

    Counted without recursion: how deep Python's own parser and writer go depends on its version and on the stack.
    """
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        depth += 1
        inside = [item.values() if isinstance(item, dict) else item for item in level]
        level = [item for items in inside for item in items if isinstance(item, dict | list)]
    return depth > MAX_DEPTH


def _is_text(value: Any) -> bool:
    """Whether every string in a parsed value can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0:  # 1e999 reads as infinity
        raise ValueError(f"{text} is out of range")
    return value
