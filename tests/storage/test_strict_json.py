"""Strict JSON: shapes declared as dataclasses and TypedDicts, and everything else refused with its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import pytest

from roundexport.errors import ArtifactError
from roundexport.quant.spec import QuantSpec
from roundexport.storage.strict_json import decode, encode, parse, parse_format


class Inner(TypedDict):
    mode: Literal["a", "b"]
    size: int | None


@dataclass(frozen=True)
class Outer:
    name: str
    share: float
    flag: bool
    inner: Inner
    pairs: tuple[tuple[str, int], ...]
    table: dict[str, Inner]
    free: dict[str, Any]
    maybe: Inner | None


GOOD: dict[str, Any] = {
    "name": "x", "share": 1, "flag": True, "inner": {"mode": "a", "size": None}, "pairs": [["p", 1], ["q", 2]],
    "table": {"t": {"mode": "b", "size": 3}}, "free": {"any": [1, {"thing": None}]}, "maybe": None,
}  # fmt: skip


def test_a_document_comes_back_as_its_declared_types() -> None:
    outer = decode(Outer, GOOD, "doc")
    assert outer.pairs == (("p", 1), ("q", 2))
    assert isinstance(outer.share, float)
    assert decode(Outer, parse(encode(outer), "doc"), "doc") == outer


def test_encoding_sorts_keys_and_keeps_text_readable() -> None:
    document = {"b": "ä", "a": [1, None], "d": {"y": {"k": [2], "é": {}}, "x": {"l": 0, "k": ""}}, "c": [(1,), []]}
    assert (
        encode(document)
        == """{
  "a": [1, null],
  "b": "ä",
  "c": [
    [1],
    []
  ],
  "d": {
    "x": {"k": "", "l": 0},
    "y": {
      "k": [2],
      "é": {}
    }
  }
}
""".encode()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, r"doc: unknown key 'extra'; known keys: flag, free"),
        ({"name": 3}, r"doc\.name: expected a string, found 3"),
        ({"share": "1"}, r"doc\.share: expected a number, found '1'"),
        ({"share": True}, r"doc\.share: expected a number, found True"),
        ({"share": 10**400}, r"doc\.share: expected a number"),
        ({"flag": 1}, r"doc\.flag: expected true or false, found 1"),
        ({"flag": None}, r"doc\.flag: expected true or false, found None"),
        ({"inner": None}, r"doc\.inner: expected an object, found None"),
        ({"inner": {"mode": "c", "size": 1}}, r"doc\.inner\.mode: expected one of 'a', 'b', found 'c'"),
        ({"inner": {"mode": ["a"], "size": 1}}, r"doc\.inner\.mode: expected one of"),
        ({"inner": {"mode": "a", "size": True}}, r"doc\.inner\.size: expected a whole number, found True"),
        ({"inner": {"mode": "a", "size": 1.0}}, r"doc\.inner\.size: expected a whole number, found 1\.0"),
        ({"inner": {"mode": "a"}}, r"doc\.inner: key 'size' is missing"),
        ({"pairs": {}}, r"doc\.pairs: expected an array, found an object"),
        ({"pairs": [["p"]]}, r"doc\.pairs\[0\]: expected an array of 2, found an array of 1"),
        ({"pairs": [["p", 1], ["q", "2"]]}, r"doc\.pairs\[1\]\[1\]: expected a whole number, found '2'"),
        ({"table": []}, r"doc\.table: expected an object, found an array of 0"),
        ({"table": {"t": {"mode": "x", "size": 3}}}, r"doc\.table\.t\.mode: expected one of"),
        ({"free": 1}, r"doc\.free: expected an object"),
        ({"maybe": 1}, r"doc\.maybe: expected an object, found 1"),
    ],
)
def test_a_deviation_is_refused_with_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        decode(Outer, {**GOOD, **change}, "doc")


def test_what_the_class_itself_refuses_names_the_place_too() -> None:
    with pytest.raises(ArtifactError, match=r"doc: bits 5 is not supported"):
        decode(QuantSpec, {**QuantSpec().to_json(), "bits": 5}, "doc")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":1,"a":1}', "the key 'a' appears twice"),
        ('{"a":{"b":1,"b":1}}', "the key 'b' appears twice"),
        ('{"a":NaN}', "NaN is no JSON number"),
        ('{"a":-Infinity}', "-Infinity is no JSON number"),
        ('{"a":1e999}', "1e999 is out of range"),
        ("[1]", "expected a JSON object, found an array of 1"),
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' + "9" * 5000 + "}", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        ("\ufeff{}", "not valid JSON"),
        ('{"a":' * 101 + "1" + "}" * 101, "nested more than 100 deep"),
        ('{"a":' + "[" * 900 + "]" * 900 + "}", "nested more than 100 deep"),
        (r'{"a":"\ud800"}', "half of a surrogate pair"),
        (r'{"a":[{"x\uDFFF":1}]}', "half of a surrogate pair"),
        ('{"a":"\ud800"}'.encode("utf-8", "surrogatepass"), "not valid JSON"),
        ('{"a":[' + "[]," * 5_000_000 + "[]]}", "about 10000003 values, of which at most 4000000 are read"),
    ],
)
def test_text_that_is_no_strict_json_object_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        parse(text, "doc")


@pytest.mark.parametrize(
    "text",
    ['{"a":' * 100 + "1" + "}" * 100, r'{"a":"\ud83e\udd17 \\ud800"}', '{"a":"🤗"}'],
    ids=["deep", "escape", "plain"],
)
def test_what_is_read_can_be_written_again(text: str) -> None:
    parsed = parse(text, "doc")
    assert parse(encode(parsed), "doc") == parsed


def test_another_format_is_told_before_anything_else() -> None:
    assert parse_format(b'{"format":"f/1","x":2}', "f/1", "doc") == {"format": "f/1", "x": 2}
    for text in (b'{"format":"f/2","x":2}', b"{}", b'{"format":["f/1"]}'):
        with pytest.raises(ArtifactError, match="this version of roundexport reads 'f/1'"):
            parse_format(text, "f/1", "doc")


def test_keys_that_are_not_strings_are_refused() -> None:
    with pytest.raises(TypeError, match="keys of JSON objects are strings"):
        encode({1: {"x": [1]}})
