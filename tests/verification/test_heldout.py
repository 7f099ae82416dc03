"""Held-out text: the bundled one is disjoint from what models are calibrated on, and small contexts are verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from silent_work import notes_silent_work
from speech_toys import wav

from roundexport.calibration.samples import load_calibration
from roundexport.calibration.waveforms import drawn_samples
from roundexport.errors import UsageError
from roundexport.model.checkpoint import Checkpoint
from roundexport.progress import Progress
from roundexport.storage.checksums import sha256_file
from roundexport.verification.decoder import measure_decoder
from roundexport.verification.heldout import BUNDLED, check_disjoint, check_heldout, heldout_ids, heldout_texts

Models = Callable[[str], Path]


def manifest(task: str = "generate", **calibration: Any) -> Any:
    return SimpleNamespace(task=task, source={"calibration": calibration})


def _runs(text: str, words: int = 8) -> set[tuple[str, ...]]:
    split = text.split()
    return {tuple(split[i : i + words]) for i in range(len(split) - words + 1)}


def test_the_bundled_text_shares_no_eight_words_with_the_calibration_text(calibration_text: Path) -> None:
    bundled = BUNDLED.read_text(encoding="utf-8")
    assert len(bundled) > 80_000 and BUNDLED.stat().st_size < 100_000
    assert not _runs(bundled) & _runs(calibration_text.read_text(encoding="utf-8"))


def test_the_bundled_text_is_held_out_text_of_the_sample_model(heldout_text: Path) -> None:
    """The sample model was trained on other passages of the same books."""
    paragraphs = set(heldout_text.read_text(encoding="utf-8").split("\n"))
    assert set(BUNDLED.read_text(encoding="utf-8").split("\n")) <= paragraphs


def test_what_was_calibrated_on_is_refused_bundled_or_not(calibration_text: Path) -> None:
    check_disjoint(manifest(kind="self"), None)
    with pytest.raises(UsageError, match="bundled held-out text is text that this package was calibrated on"):
        check_disjoint(manifest(text_sha256=sha256_file(BUNDLED)), None)
    mixed = manifest(kind="mixture", parts=[{"kind": "self"}, {"kind": "text", "text_sha256": sha256_file(BUNDLED)}])
    with pytest.raises(UsageError, match="calibrated on"):
        check_disjoint(mixed, None)
    with pytest.raises(UsageError, match="calibrated on"):
        check_disjoint(manifest(text_sha256=sha256_file(calibration_text)), calibration_text)


def test_sounds_that_were_calibrated_on_are_refused_however_many_are_asked_for(tmp_path: Path) -> None:
    for folder in ("used", "new"):
        (tmp_path / folder).mkdir()
        for number, samples in enumerate(0.2 * drawn_samples(2, 3000, len(folder))):
            (tmp_path / folder / f"{number}.wav").write_bytes(wav(samples))
    config = {"conv_kernel": [10, 3], "conv_stride": [5, 4]}
    model: Any = SimpleNamespace(task="ctc", folder=tmp_path, config=config, location="m")
    found = load_calibration(model, str(tmp_path / "used"), num_samples=2, sample_len=64)
    assert len(found.ids) == 2 and len(found.identity["sounds_sha256"]) == 1  # both are of the first file
    for task in ("ctc", "transcribe"):
        asked = manifest(task, **found.identity)
        with pytest.raises(UsageError, match=r"calibrated on 0\.wav of these sounds"):
            check_disjoint(asked, tmp_path / "used")
        check_disjoint(asked, tmp_path / "new")
        check_disjoint(manifest(task, kind="none"), tmp_path / "used")


@pytest.mark.parametrize("asked", [1, 2, 5])
def test_pictures_that_were_calibrated_on_are_refused_however_many_are_read(asked: int, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for place in ("used/0", "used/1", "used/2", "new/0"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        image.new("RGB", (8, 8), f"#{len(list(tmp_path.rglob('*'))):06d}").save(tmp_path / f"{place}.png")
    prepared = {"size": {"height": 8, "width": 8}, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(prepared))
    model: Any = SimpleNamespace(task="embed_image", part=None, folder=tmp_path, config={}, location="m")
    found = load_calibration(model, str(tmp_path / "used"), num_samples=asked, sample_len=64)
    known = manifest("embed_image", **found.identity)
    with pytest.raises(UsageError, match=r"calibrated on 0\.png.* of these pictures; give others"):
        check_disjoint(known, tmp_path / "used")  # verification reads two of them, or more, or less
    check_disjoint(known, tmp_path / "new")
    check_disjoint(known, None)
    check_disjoint(manifest("embed_image", kind="drawn"), tmp_path / "used")


def test_windows_are_of_the_bundled_text_where_no_other_is_given(models: Models, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    ids, name = heldout_ids(checkpoint, manifest(kind="self"), None, 16, 64, Progress(False))
    assert ids.shape == (16, 64) and name == "bundled text"
    with pytest.raises(UsageError, match="one window"):
        heldout_ids(checkpoint, manifest(kind="self"), None, 16, 40_000, Progress(False))
    texts, name = heldout_texts(None, 32)
    assert len(texts) == 32 and name == "bundled text"


def test_windows_of_one_token_are_refused(models: Models) -> None:
    one = SimpleNamespace(source={"calibration": {"kind": "self"}}, max_context=1)
    with pytest.raises(UsageError, match="windows of 1 token predict nothing; the package takes 1"):
        heldout_ids(Checkpoint.open(models("llama")), one, None, 2, 1, Progress(False))  # type: ignore[arg-type]


def test_a_model_without_a_tokenizer_writes_its_own_text(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    folder = shutil.copytree(models("llama"), tmp_path / "m", ignore=shutil.ignore_patterns("token*"))
    silent = notes_silent_work(monkeypatch)
    ids, name = heldout_ids(Checkpoint.open(folder), manifest(kind="self"), None, 2, 16, Progress(False))
    assert ids.shape == (2, 16) and "sampled from the float model" in name and silent == []


@pytest.mark.parametrize("context", [8, 40, 79, 80])
def test_a_package_of_few_tokens_is_verified(context: int, models: Models) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    asked: list[int] = []

    class Engine:
        def logits(self, ids: np.ndarray) -> np.ndarray:
            return np.zeros((*ids.shape, 384), np.float32)

        def greedy(self, prompts: list[list[int]], count: int) -> list[np.ndarray]:
            asked.append(len(prompts[0]) + count)
            return [np.zeros(count, np.int64) for _ in prompts]

    ids = np.random.default_rng(0).integers(4, 384, (2, min(context, 64)))
    found = measure_decoder(checkpoint, Engine(), ids, max_context=context, cache=None)  # type: ignore[arg-type]
    assert asked == [context] and found.divergence_horizon == context - min(32, context // 2)


def test_what_cannot_be_read_is_refused_before_tuning(tmp_path: Path) -> None:
    (tmp_path / "said").mkdir()
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    for given in (None, tmp_path / "said", tmp_path / "bytes.txt"):
        with pytest.raises(UsageError, match=r"this model hears.*give a folder of \.wav files"):
            check_heldout("transcribe", given)
    (tmp_path / "said" / "one.wav").touch()
    check_heldout("transcribe", tmp_path / "said")
    check_heldout("embed_image", tmp_path / "said")
    check_heldout("generate", None)
    for given in (tmp_path / "said", tmp_path / "bytes.txt"):
        with pytest.raises(UsageError, match="the held-out text cannot be read"):
            check_heldout("generate", given)
