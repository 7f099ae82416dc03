"""Exported packages on their engines: what the toys promise, for real graphs of every family.

A cache, padding and batches may only change the order of float32 sums; with ``precise`` that never changes a greedy
token of these models, so tokens are compared one by one with the likeliest of the whole sequence computed without a
cache (greedy_reading.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from greedy_reading import likeliest

from conftest import DECODERS, ENCODERS
from roundexport.runtime import Decoder, Encoder, GenerationSettings, load

TARGETS = ("onnx", "openvino")
Packages = Callable[[str, str], Path]


@pytest.fixture
def packages(packages: Callable[[str, str], tuple[Path, Path]]) -> Packages:
    """``packages("llama", "onnx")`` is a 4-bit package of that family (``sample``: the bundled model)."""
    return lambda family, target: packages(family, target)[1]


def decoder(folder: Path) -> Decoder:
    engine = load(folder, threads=2, precise=True)
    assert isinstance(engine, Decoder)
    return engine


def prompts(engine: Decoder, *lengths: int) -> list[list[int]]:
    random = np.random.default_rng(sum(lengths))
    return [random.integers(4, engine.manifest.vocab_size, length).tolist() for length in lengths]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", ["sample", *DECODERS])
def test_decoding_with_a_cache_equals_recomputing(packages: Packages, family: str, target: str) -> None:
    engine = decoder(packages(family, target))

    def whole(ids: list[list[int]]) -> np.ndarray:
        return engine.logits(np.array(ids))

    for lengths in ((1,), (17,), (300,), (1, 17, 300)):
        rows = prompts(engine, *lengths)
        found = [row.tolist() for row in engine.greedy(rows, 12)]
        assert all(len(written) == 12 for written in found)
        assert found == [likeliest(whole, *both) for both in zip(rows, found, strict=True)], lengths


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_sample_model_goes_on_in_words(packages: Packages, target: str) -> None:
    engine = load(packages("sample", target), threads=2)
    assert isinstance(engine, Decoder)
    steps = list(engine.generate(["The old man looked at the sea and"], GenerationSettings(max_new_tokens=24)))
    text = "".join(step.text[0] for step in steps)
    assert sum(word.strip(".,;:\"'!?").isalpha() for word in text.split()) >= 10, text


@pytest.mark.slow
def test_both_engines_compute_the_same(packages: Packages) -> None:
    ids = np.array(prompts(decoder(packages("sample", "onnx")), 64))
    onnx, openvino = (decoder(packages("sample", target)).logits(ids) for target in TARGETS)
    # The same integers in float32 on both, sums of at most 768 products in another order: relative 1e-5 of logits
    # around 20, over four blocks.
    assert np.abs(onnx - openvino).max() < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_agree_across_engines_and_batches(packages: Packages, family: str) -> None:
    texts = ["The sea was calm.", "A", "An old man stood on the shore and looked long at the boats that came home."]
    found = []
    for target in TARGETS:
        engine = load(packages(family, target), threads=2, precise=True)
        assert isinstance(engine, Encoder)
        together, alone = engine.embed(texts), np.concatenate([engine.embed([text]) for text in texts])
        # Padding only adds masked positions: float32 rounding of unit vectors and of unnormalised ones around 1.
        assert np.abs(together - alone).max() < 1e-4 * max(1.0, float(np.abs(alone).max()))
        found.append(together)
    assert np.abs(found[0] - found[1]).max() < 1e-3 * max(1.0, float(np.abs(found[0]).max()))
