"""samples/authorship: the bundled paragraphs are whole, split by book, and its measures measure what they say."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from sample_modules import sample_modules


@pytest.fixture(scope="module")
def sample() -> Iterator[dict[str, ModuleType]]:
    with sample_modules("authorship", "task", "compare", "components") as found:
        yield found


@pytest.fixture(scope="module")
def task(sample: dict[str, ModuleType]) -> ModuleType:
    return sample["task"]


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


def test_nothing_is_taken_over_from_another_package(sample: dict[str, ModuleType], tmp_path: Path) -> None:
    compare, texts, asked = sample["compare"], ["a", "b", "c", "d"], []

    def embed(given: Any) -> np.ndarray:
        asked.extend(given)
        return np.zeros((len(given), 2), np.float32)

    def times(digest: str) -> int:
        asked.clear()
        assert set(compare.times({"a row": compare.Row(embed, 1, digest)}, texts, tmp_path / "times.json")) == {"a row"}
        return len(asked)

    assert times("one") > 0 and times("one") == 0 and times("other") > 0


def test_a_package_counts_without_its_tokenizer(sample: dict[str, ModuleType], tmp_path: Path) -> None:
    sizes = {"model.onnx": 1, "roundexport.json": 2, "1_Pooling/config.json": 4, "openvino_tokenizer.bin": 8}
    for name, size in {**sizes, "tokenizer.json": 16, "vocab.txt": 32, "special_tokens_map.json": 64}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert sample["compare"].counted(tmp_path) == 7


def test_components_of_a_toy(
    sample: dict[str, ModuleType], models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from roundexport.integer_encoder import files
    from roundexport.integer_encoder.calibrate import calibrate
    from roundexport.integer_encoder.float_encoder import FloatEncoder
    from roundexport.integer_encoder.rounders import ForIntegers
    from roundexport.model.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(str(models("bert")))
    ids = np.random.default_rng(0).integers(4, 384, (4, 8))
    files.save(calibrate(FloatEncoder.of(checkpoint), ids, ForIntegers()), tmp_path / "integers.safetensors")
    assert sample["compare"].place(checkpoint, tmp_path).name.startswith(checkpoint.digest[:10])
    arguments = [
        "components.py",
        str(tmp_path / "integers.safetensors"),
        "--texts",
        "2",
        "--model",
        str(models("bert")),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    sample["components"].main()
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("simulation and reference: 0 of ")
    assert rows[0].startswith("everything, in integers") and len(rows) == 15
