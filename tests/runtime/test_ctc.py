"""From letters of frames to words: transformers' own tokenizer says what is right."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from roundexport.errors import ArtifactError, UnsupportedError
from roundexport.runtime.frame_transcription import FrameTranscriber
from roundexport.runtime.speech.ctc import CtcVocabulary, read_vocabulary
from roundexport.runtime.speech.waveform import Waveform, frame_size, frames_of, least_samples, read_waveform

LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"HELO"]


def write(folder: Path, **settings: Any) -> dict[str, int]:
    vocabulary = {letter: place for place, letter in enumerate(LETTERS)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>", **settings}))
    return vocabulary


def test_repeats_become_one_and_blanks_go() -> None:
    vocabulary = CtcVocabulary(("", "h", "e", "l", "o", "|"), 0, 5)
    words = vocabulary.words([0, 1, 1, 2, 0, 3, 3, 0, 3, 4, 0, 5, 5, 0, 1, 0])
    assert [(word.text, word.start, word.end) for word in words] == [("hello", 1, 10), ("h", 14, 15)]
    assert vocabulary.text([0, 0]) == ""


@pytest.mark.parametrize("lower", [False, True])
def test_texts_are_those_of_transformers(lower: bool, tmp_path: Path) -> None:
    from transformers import Wav2Vec2CTCTokenizer

    write(tmp_path, do_lower_case=lower)
    tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), do_lower_case=lower)
    vocabulary = read_vocabulary(tmp_path, 0, len(LETTERS))
    generator = np.random.default_rng(0)
    for _ in range(20):
        ids = generator.choice([0, 4, 5, 6, 7, 8], 30).repeat(generator.integers(1, 3, 30)).tolist()
        assert vocabulary.text(ids) == " ".join(tokenizer.decode(ids).split())


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no vocab\.json"):
        read_vocabulary(tmp_path, 0, 9)
    (tmp_path / "vocab.json").write_text(json.dumps({"eng": {"a": 0}}))
    with pytest.raises(UnsupportedError, match="several languages"):
        read_vocabulary(tmp_path, 0, 9)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": "b"}))
    with pytest.raises(ArtifactError, match="must have an id"):
        read_vocabulary(tmp_path, 0, 9)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(ArtifactError, match="no id for the blank"):
        read_vocabulary(tmp_path, None, 9)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"feature_extractor_type": "Other"}))
    with pytest.raises(UnsupportedError, match="prepared by Other"):
        read_waveform(tmp_path)


@pytest.mark.parametrize("normalize", [False, True])
def test_samples_are_prepared_as_transformers_does(normalize: bool) -> None:
    from transformers import Wav2Vec2FeatureExtractor

    sound = np.random.default_rng(0).normal(0.1, 0.3, 4000).astype(np.float32)
    wanted = Wav2Vec2FeatureExtractor(do_normalize=normalize)(sound, sampling_rate=16_000)["input_values"][0]
    assert np.allclose(Waveform(do_normalize=normalize)(sound), wanted, atol=1e-6)


def test_an_adapter_behind_the_encoder_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="add_adapter"):
        frame_size({"conv_kernel": [10], "conv_stride": [5], "add_adapter": True}, "m")


def test_a_graph_of_other_frames_than_its_config_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"conv_kernel": [10], "conv_stride": [5]}))
    package = object.__new__(FrameTranscriber)
    monkeypatch.setattr(FrameTranscriber, "_folder", tmp_path, raising=False)
    listed = SimpleNamespace(files={"config.json": {}})
    monkeypatch.setattr(FrameTranscriber, "manifest", listed, raising=False)
    monkeypatch.setattr(FrameTranscriber, "output", lambda self, inputs: np.zeros((1, 2, 9), np.float32))
    assert len(package.logits(np.zeros(15, np.float32))) == 2
    with pytest.raises(ArtifactError, match=r"makes 2 frames of 20 samples, .* config\.json make 3"):
        package.logits(np.zeros(20, np.float32))


def test_frames_are_counted_as_convolutions_do() -> None:
    config = {"conv_kernel": [10, 3, 3], "conv_stride": [5, 2, 2]}
    least = least_samples(config)
    assert [frames_of(config, least + extra) for extra in (-1, 0, 19, 20)] == [0, 1, 1, 2]
