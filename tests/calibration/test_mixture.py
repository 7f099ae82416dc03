"""Several calibration sources by their shares: what is named, what each gives, in which order, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tuning_tools import QUICK

from conftest import tuned
from roundexport.calibration.mixture import Part, anywhere, by_content, counts_of, interleaved, parts_of
from roundexport.calibration.samples import ids_digest, load_calibration
from roundexport.errors import UsageError
from roundexport.formats.artifact import Artifact
from roundexport.model.checkpoint import Checkpoint
from roundexport.reports.story import _calibration
from roundexport.storage.checksums import sha256_file
from roundexport.tuning.settings import TuneSettings

Models = Callable[[str], Path]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b,c.txt", "odd:0.5"):
        Path(name).write_text(f"the text of {name} goes on and on " * 300, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("named", "parts"),
    [
        ("self", [("self", 1)]),
        ("a.txt", [("a.txt", 1)]),
        ("a.txt:1", [("a.txt", 1)]),
        ("odd:0.5", [("odd:0.5", 1)]),
        ("b,c.txt", [("b,c.txt", 1)]),
        ("owner/name:2.0", [("owner/name:2.0", 1)]),
        ("a.txt:0.75,b.txt:.25", [("a.txt", 0.75), ("b.txt", 0.25)]),
        ("a.txt:0.75, self:0.25", [("a.txt", 0.75), ("self", 0.25)]),
        ("b,c.txt:0.5,odd:0.5:0.5", [("b,c.txt", 0.5), ("odd:0.5", 0.5)]),
        ("owner/name:config:0.33,x:.33,y:.33", [("owner/name:config", 0.33), ("x", 0.33), ("y", 0.33)]),
    ],
)
def test_what_is_named(named: str, parts: list[tuple[str, float]], here: Path) -> None:
    assert parts_of(named) == tuple(Part(*pair) for pair in parts)


@pytest.mark.parametrize(
    ("named", "error"),
    [
        ("a.txt:0.75,b.txt:0.5", r"sum to 1, and sum to 1.25: a.txt with 0.75, b.txt with 0.5"),
        ("a.txt:0.5", "sum to 0.5"),
        ("self:0.5", "sum to 0.5"),
        ("a.txt:1.5,b.txt:-0.5", r"the share of b.txt is -0.5; it must be > 0"),
        ("a.txt:1,b.txt:0", "the share of b.txt is 0"),
        ("a.txt:0.75,b.txt", "'b.txt' has no share"),
        ("a.txt:1,", "has no share"),
        ("a.txt:0.5,a.txt:0.5", "a.txt is named twice"),
        ("odd:0.5,b.txt:0.25,c.txt:0.5", "rename such a file"),  # what is meant is a file "odd:0.5,b.txt"
        ("self:0.999,b.txt:0.001", "of 16 samples none is left for b.txt"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_tuned(named: str, error: str, here: Path) -> None:
    with pytest.raises(UsageError, match=error):
        TuneSettings(recipe="light", calibration=named)


def test_counts_are_the_largest_remainders() -> None:
    thirds = [Part(name, 0.333) for name in "abc"]
    assert counts_of(thirds, 16) == [6, 5, 5] and counts_of(thirds, 3) == [1, 1, 1]
    assert counts_of([Part("a", 0.61), Part("b", 0.39)], 10) == [6, 4]
    assert counts_of([Part("a", 1.0)], 7) == [7]


@pytest.mark.parametrize("counts", [[96, 32], [5, 11], [1, 15], [6, 5, 5], [100, 27, 1]])
def test_every_beginning_keeps_the_shares_within_a_sample(counts: list[int]) -> None:
    total, starts = sum(counts), np.cumsum([0, *counts])
    order = interleaved(counts)
    assert sorted(order) == list(range(total))
    for part, count in enumerate(counts):
        own = [starts[part] <= row < starts[part + 1] for row in order]
        assert np.diff([row for row, mine in zip(order, own, strict=True) if mine]).tolist() == [1] * (count - 1)
        assert np.abs(np.cumsum(own) - count / total * np.arange(1, total + 1)).max() <= 1


def test_a_mixture_is_its_parts(models: Models, here: Path) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    named = "a.txt:0.75,self:0.25"
    found = load_calibration(checkpoint, named, num_samples=8, sample_len=16, seed=3)
    text = load_calibration(checkpoint, "a.txt", num_samples=6, sample_len=16, seed=3)
    own = load_calibration(checkpoint, "self", num_samples=2, sample_len=16, seed=3)
    np.testing.assert_array_equal(found.ids[[0, 1, 3, 4, 5, 7]], text.ids)
    np.testing.assert_array_equal(found.ids[[2, 6]], own.ids)
    first, second = found.identity["parts"]
    assert first == {
        "kind": "text", "file": "a.txt", "text_sha256": sha256_file(here / "a.txt"), "share": 0.75, "num_samples": 6,
        "ids_sha256": ids_digest(text.ids),
    }  # fmt: skip
    assert second["kind"] == "self" and second["ids_sha256"] == own.identity["ids_sha256"]
    whole = {name: found.identity[name] for name in ("kind", "ids_sha256", "num_samples", "sample_len", "seed")}
    assert whole == {
        "kind": "mixture", "ids_sha256": ids_digest(found.ids), "num_samples": 8, "sample_len": 16, "seed": 3,
    }  # fmt: skip
    said = "75 % a text file (a.txt) and 25 % written by the model itself, 8 samples of 16 tokens, seed 3"
    assert _calibration(found.identity) == said


def test_an_artifact_names_the_parts(models: Models, here: Path) -> None:
    out = tuned(models("llama"), here / "out", calibration="a.txt:0.67,self:0.33", **QUICK)
    found = Artifact.open(out).manifest.calibration
    assert [(part["kind"], part["share"], part["num_samples"]) for part in found["parts"]] == [
        ("text", 0.67, 4),
        ("self", 0.33, 2),
    ]


def test_a_model_with_two_halves_answers_a_mixture(models: Models, here: Path) -> None:
    found = load_calibration(Checkpoint.open(models("t5")), "a.txt:0.5,self:0.5", num_samples=4, sample_len=16)
    assert [part["kind"] for part in found.identity["parts"]] == ["text", "vocabulary"]
    assert found.ids.shape == (4, 31) and "answers" in found.identity


def test_a_part_that_is_too_short_for_its_share_is_refused(models: Models, here: Path) -> None:
    Path("short.txt").write_text("the quick brown fox jumps over the lazy dog " * 10, encoding="utf-8")
    with pytest.raises(UsageError, match=r"short.txt: holds \d+ samples of 16 tokens, and its share of 0.5 takes 100"):
        load_calibration(Checkpoint.open(models("llama")), "a.txt:0.5,short.txt:0.5", num_samples=200, sample_len=16)


def test_a_part_that_is_nothing_is_refused_by_its_name(models: Models, here: Path) -> None:
    with pytest.raises(UsageError, match=r"calibration 'gone.txt': there is no such file"):
        load_calibration(Checkpoint.open(models("llama")), "a.txt:0.5,gone.txt:0.5", num_samples=2, sample_len=16)


def test_what_is_asked_for_is_known_by_its_content(here: Path) -> None:
    named, moved = "a.txt:0.75,b,c.txt:0.25", "same:0.75,b,c.txt:0.25"
    Path("same").write_bytes(Path("a.txt").read_bytes())
    before = by_content(named)
    assert before == by_content(moved) != by_content("a.txt:0.25,b,c.txt:0.75")
    Path("b,c.txt").write_text("other", encoding="utf-8")
    assert by_content(named) != before
    folder = here / "pictures"
    folder.mkdir()
    (folder / "1.png").write_bytes(b"1")
    before = by_content(str(folder))
    (folder / "1.png").write_bytes(b"2")
    assert by_content(str(folder)) != before and by_content("self") == "self"
    Path("same.jsonl").write_bytes(Path("a.txt").read_bytes())
    assert by_content("same.jsonl") != by_content("a.txt")  # the same bytes, read as records


def test_a_worker_in_another_folder_finds_the_parts(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = anywhere("a.txt:0.5,self:0.2,owner/name:0.3")
    assert named == f"{here / 'a.txt'}:0.5,self:0.2,owner/name:0.3"
    assert anywhere("odd:0.5") == str(here / "odd:0.5") and anywhere("self") == "self"
    (here / "else").mkdir()
    content = by_content(named)
    os.chdir(here / "else")  # the fixture goes back
    assert by_content(named) == content
