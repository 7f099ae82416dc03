"""samples/authorship: the bundled paragraphs are whole, split by book, and its measures measure what they say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "samples" / "authorship"


@pytest.fixture(scope="module")
def task() -> ModuleType:
    spec = importlib.util.spec_from_file_location("authorship_task", FOLDER / "task.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_paragraphs_are_all_there(task: ModuleType) -> None:
    texts = task.read()
    assert np.bincount(texts.learn_authors).tolist() == [50] * 20
    assert np.bincount(texts.test_authors).tolist() == [100] * 20
    assert not set(texts.learn) & set(texts.test)
    assert len(texts.sentences) == 5000
    fifth = texts.part(0.2)
    assert (len(fifth.learn), len(fifth.test), len(fifth.sentences)) == (1000, 400, 1000)
    assert len(set(fifth.test_authors.tolist())) == 20


def test_a_head_learns_and_neighbors_are_counted(task: ModuleType) -> None:
    random = np.random.default_rng(0)
    authors = random.integers(0, 5, 200)
    vectors = (random.standard_normal((5, 16))[authors] + 0.1 * random.standard_normal((200, 16))).astype(np.float32)
    assert task.Head.learned(vectors, authors).right(vectors, authors).mean() > 0.98
    assert task.recall(vectors, 3 * vectors) == 1.0
    assert task.recall(vectors, random.standard_normal((200, 16))) < 0.2
    assert task.cosine(vectors, -vectors) == pytest.approx(-1)
