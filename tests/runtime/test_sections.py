"""A graph in sections gives what it gives whole, with no more weights open at once than were asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from roundexport.errors import UnsupportedError
from roundexport.formats.package import read_package
from roundexport.runtime.engines import _ort_sections, _ov_sections
from roundexport.runtime.loading import load
from roundexport.runtime.sections import cut_places, run_in_sections, token_stream
from roundexport.runtime.types import EngineOptions

GOLDEN = ROOT / "tests" / "golden"
PRECISE = EngineOptions(threads=1, precise=True)

# weights, values that cross before each, most, where it is cut
CUTS = [
    ([], [0], 10, []),
    ([4, 4, 4], [0, 1, 1], 12, []),
    ([4, 4, 4], [0, 1, 1], 8, [2]),
    ([4, 4, 4, 4], [0, 1, 1, 1], 4, [1, 2, 3]),
    ([2, 2, 2, 2, 2], [0, 1, 1, 3, 9], 8, [2]),  # where less crosses, though a later place would hold more
    ([2, 2, 2, 2], [0, 1, 5, 5], 6, [3]),  # the first place leaves too little before it
    ([9, 1, 9], [0, 2, 2], 5, [1, 2]),  # a weight larger than a section is one alone
    ([4, 4, 4, 4], [0, -1, -1, 1], 4, [3]),  # a state stays with who writes it
]


@pytest.mark.parametrize(("weights", "crossing", "most", "expected"), CUTS)
def test_cuts(weights: list[int], crossing: list[int], most: int, expected: list[int]) -> None:
    assert cut_places(weights, [*crossing, 0], most) == expected


@pytest.mark.parametrize(("target", "engine"), [("onnx", _ort_sections), ("openvino", _ov_sections)])
def test_a_decoder_in_sections_gives_the_logits_of_the_whole(target: str, engine, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    opened = []
    right = engine._take
    monkeypatch.setattr(engine, "_take", lambda *args: (opened.append(args[1]), right(*args))[1])
    folder = GOLDEN / target
    manifest = read_package(folder, check_hashes=False)
    ids = np.random.default_rng(0).integers(5, manifest.vocab_size, (2, 12))
    expected = load(folder, check_hashes=False, threads=1, precise=True).logits(ids)
    streams = [token_stream(ids, [12]), token_stream(ids[:1], [5, 10, 11, 12])]
    whole, pieces = run_in_sections(folder, manifest, PRECISE, 10_000, streams)
    assert len({id(section) for section in opened}) >= 3
    np.testing.assert_allclose(whole[0]["logits"], expected, atol=1e-5)
    given = np.concatenate([call["logits"] for call in pieces], 1)
    np.testing.assert_allclose(given, expected[:1], atol=1e-5)


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_an_encoder_in_sections(target: str, packages: Callable[[str, str], tuple[Path, Path]]) -> None:
    from roundexport.runtime.sections import Stream

    _, folder = packages("bert", target)
    manifest = read_package(folder, check_hashes=False)
    inputs = {"input_ids": np.array([[7, 8, 9], [7, 8, 1]]), "attention_mask": np.array([[1, 1, 1], [1, 1, 0]])}
    inputs["token_type_ids"] = np.zeros_like(inputs["input_ids"])
    expected = load(folder, check_hashes=False, threads=1, precise=True).output(inputs)
    ((call,),) = run_in_sections(folder, manifest, PRECISE, 30_000, [Stream([inputs])])
    np.testing.assert_allclose(call["last_hidden_state"], expected, atol=1e-5)


def test_two_graphs_are_refused() -> None:
    from dataclasses import replace

    manifest = replace(read_package(GOLDEN / "onnx", check_hashes=False), task="translate")
    with pytest.raises(UnsupportedError, match="two graphs"):
        list(run_in_sections(GOLDEN / "onnx", manifest, PRECISE, 1, []))
