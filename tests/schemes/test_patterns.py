"""Rules from a stranger's file: what cannot be meant is refused with its reason, and nothing hangs."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from roundexport.errors import UsageError
from roundexport.schemes.patterns import check_pattern, check_time
from roundexport.schemes.rules import Rule, read_rules

NAMES = [f"model.layers.{i}.mlp.down_proj" for i in range(30)]


@pytest.mark.parametrize("pattern", ["a{4294967296}", "(", "[z-a]", "a" * 1001, "(?P<x", "*"])
def test_what_does_not_compile_is_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match=r"regular expression|may have 1000 characters"):
        check_pattern(pattern, "rule")


@pytest.mark.parametrize("pattern", [r"([\w.]+)+!", r"(.+)+!", r"(.|\w)*!", ".*.*.*.*.*.*.*.*.*.*.*.*!"])
def test_a_pattern_that_never_ends_is_refused_in_time(pattern: str) -> None:
    began = time.monotonic()
    with pytest.raises(UsageError, match="takes more than 1 s to be searched in 30 layer names"):
        check_time([pattern], NAMES, seconds=1.0)
    assert time.monotonic() - began < 20


def test_ordinary_patterns_pass() -> None:
    check_time([r"layers\.(0|1|2)\.", "down_proj$", r"(\w+\.)+down_proj$", r"layers\.\d+\.mlp"], NAMES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 4.0}, "bits must be a whole number, not 4.0"),
        ({"bits": True}, "bits must be a whole number, not True"),
        ({"bits": "4"}, "bits must be a whole number, not '4'"),
        ({"bits": None}, "bits must be a whole number, not None"),
        ({"group_size": 32.0}, "group_size must be a whole number or null, not 32.0"),
        ({"symmetric": 1}, "symmetric must be true, false or null, not 1"),
    ],
)
def test_values_have_their_own_type(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Rule("down_proj$", changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"match": "a", "bits": 2, "bits": 8}]', "key 'bits' stands twice"),
        ("[" * 100_000, "not valid JSON"),
        (" " * (2**20 + 1), "larger than 1,048,576 bytes"),
        ('[{"match": "a", "bits": NaN}]', "bits must be a whole number"),
    ],
)
def test_files_that_cannot_be_meant(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rules.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_rules(tmp_path / "rules.json")


def test_a_pipe_or_a_device_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UsageError, match="not a regular file"):
            read_rules(path)
