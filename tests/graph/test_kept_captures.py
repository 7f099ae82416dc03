"""What was captured is kept for the next target, and only for the very same question."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from roundexport.graph import capture as capturing
from roundexport.graph import kept_captures
from roundexport.graph.kept_captures import capture_once, captures_kept
from roundexport.model.checkpoint import Checkpoint

NORM = {"model.norm.weight": np.ones(64, np.float32)}


@pytest.fixture(autouse=True)
def nothing_kept_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite itself keeps captures."""
    monkeypatch.setattr(kept_captures, "_KEPT", ContextVar("kept in a test", default=None))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was really captured."""
    found: list[tuple[Any, ...]] = []

    def capture(*question: Any) -> SimpleNamespace:
        found.append(question)
        return SimpleNamespace()

    monkeypatch.setattr(capturing, "capture", capture)
    return found


def test_the_same_question_is_answered_once(models: Callable[[str], Path], asked: list[tuple[Any, ...]]) -> None:
    folder = models("llama, one block")
    with captures_kept(most=2):
        first = capture_once(Checkpoint.open(folder), NORM)
        same = {name: values.copy() for name, values in NORM.items()}
        assert capture_once(Checkpoint.open(folder), same) is first and len(asked) == 1
        assert capture_once(Checkpoint.open(folder), NORM, 16) is not first and len(asked) == 2
        assert capture_once(Checkpoint.open(folder), NORM) is first and len(asked) == 2


@pytest.mark.parametrize(
    "other",
    [
        lambda folder: (Checkpoint.open(folder), {}),
        lambda folder: (Checkpoint.open(folder), {"model.norm.weight": np.full(64, 2, np.float32)}),
        lambda folder: (Checkpoint.open(folder), {"model.layers.0.norm.weight": NORM["model.norm.weight"]}),
        lambda folder: (Checkpoint.open(folder), NORM, 16),
        lambda folder: (Checkpoint.open(folder), NORM, None, False),
        lambda folder: (Checkpoint.open(folder.parent / "qwen3, one block"), NORM),
    ],
    ids=["no overrides", "other values", "another name", "context", "one block of a kind", "another model"],
)
def test_another_question_is_not(
    other: Callable[[Path], Any], models: Callable[[str], Path], asked: list[tuple[Any, ...]]
) -> None:
    models("qwen3, one block")
    question = (Checkpoint.open(models("llama, one block")), NORM)
    with captures_kept():
        first = capture_once(*question)
        assert capture_once(*other(models("llama, one block"))) is not first
        capture_once(*question)
    assert len(asked) == 3  # of two only the last one was kept


def test_other_side_files_are_another_question(
    models: Callable[[str], Path], asked: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    folder = shutil.copytree(models("llama, one block"), tmp_path / "m")
    with captures_kept():
        capture_once(Checkpoint.open(models("llama, one block")))
        capture_once(Checkpoint.open(folder))
        assert len(asked) == 1
        (folder / "config_sentence_transformers.json").write_text("{}")
        capture_once(Checkpoint.open(folder))
    assert len(asked) == 2


def test_nothing_is_kept_outside_or_where_code_of_the_folder_runs(
    models: Callable[[str], Path], asked: list[tuple[Any, ...]]
) -> None:
    checkpoint = Checkpoint.open(models("llama, one block"))
    capture_once(checkpoint)
    capture_once(checkpoint)
    trusting = Checkpoint.open(models("llama, one block"), trust_remote_code=True)
    with captures_kept():
        capture_once(trusting)
        capture_once(trusting)
    assert len(asked) == 4


def test_a_block_inside_another_that_keeps_more_is_that_one(
    models: Callable[[str], Path], asked: list[tuple[Any, ...]]
) -> None:
    checkpoint = Checkpoint.open(models("llama, one block"))
    with captures_kept(2):
        first = capture_once(checkpoint)
        with captures_kept():
            assert capture_once(checkpoint) is first
        with captures_kept(3):
            assert capture_once(checkpoint) is not first
    assert len(asked) == 2
