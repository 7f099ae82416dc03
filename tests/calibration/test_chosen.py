"""What ``auto`` calibrates on: own text and the bundled one in halves, or own text alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from roundexport import TuneSettings
from roundexport.calibration.chosen import chosen_source
from roundexport.calibration.mixture import (
    AUTO,
    BUNDLED,
    anywhere,
    by_content,
    counts_of,
    in_words,
    own_text_share,
    parts_of,
)
from roundexport.calibration.samples import load_calibration
from roundexport.calibration.text import text_digest
from roundexport.conversion.outlook import outlook
from roundexport.model.checkpoint import Checkpoint
from roundexport.tuning.job import Job

Models = Callable[[str], Path]


@pytest.mark.parametrize(("samples", "own"), [(2, 1), (9, 5), (128, 64)])
def test_a_decoder_reads_own_text_and_the_bundled_one_in_halves(samples: int, own: int, models: Models) -> None:
    found = parts_of(chosen_source(Checkpoint.open(models("llama")), AUTO, samples, 16))
    assert [part.source for part in found] == ["self", str(BUNDLED)]
    assert counts_of(found, samples) == [own, samples - own]


def test_the_bundled_text_gives_no_more_than_it_has(models: Models) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    found = parts_of(chosen_source(checkpoint, AUTO, 1 << 14, 512))
    ids = load_calibration(checkpoint, str(BUNDLED), num_samples=1 << 14, sample_len=512).ids
    assert counts_of(found, 1 << 14)[1] == len(ids) < 1 << 13


def test_whoever_cannot_read_or_write_keeps_to_itself(models: Models, tmp_path: Path) -> None:
    assert chosen_source(Checkpoint.open(models("bert")), AUTO, 8, 16) == "self"
    decoder = Checkpoint.open(models("llama"))
    assert chosen_source(decoder, AUTO, 1, 16) == "self"  # one sample has no halves
    bare = shutil.copytree(models("llama"), tmp_path / "bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    assert chosen_source(Checkpoint.open(bare), AUTO, 8, 16) == "self"
    assert chosen_source(decoder, "a.txt", 8, 16) == "a.txt"


def test_a_decoder_that_cannot_begin_a_text_reads_the_bundled_one(models: Models, tmp_path: Path) -> None:
    mute = shutil.copytree(models("llama"), tmp_path / "mute")
    for path in (mute / "config.json", mute / "generation_config.json"):
        if path.exists():
            values = json.loads(path.read_text())
            path.write_text(json.dumps({**values, "bos_token_id": None, "eos_token_id": None}))
    checkpoint = Checkpoint.open(mute)
    assert [chosen_source(checkpoint, AUTO, count, 16) for count in (1, 8)] == [str(BUNDLED)] * 2
    assert load_calibration(checkpoint, AUTO, num_samples=3, sample_len=16).ids.shape == (3, 16)
    assert "calibration text" not in outlook(checkpoint, TuneSettings(), ["onnx"])


def test_it_is_the_default_and_a_request_by_content(models: Models) -> None:
    assert TuneSettings().calibration == AUTO and own_text_share(AUTO) == 0.5
    assert by_content(AUTO) == f"auto {text_digest(BUNDLED)}" and anywhere(AUTO) == AUTO
    job = Job.of(models("llama"), TuneSettings(recipe="rtn", group_size=32, num_samples=4, sample_len=16))
    assert job.settings.calibration == chosen_source(job.checkpoint, AUTO, 4, 16)
    assert in_words(job.settings.calibration) == "50% self, 50% bundled.txt" and in_words("a/b.txt") == "a/b.txt"
