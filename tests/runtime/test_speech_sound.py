"""WAV files of every kind, resampling, and features beside transformers' own."""

from __future__ import annotations

import struct
import wave
from pathlib import Path

import numpy as np
import pytest
from speech_toys import wav
from transformers import WhisperFeatureExtractor

from roundexport.errors import ArtifactError, RoundexportError, UnsupportedError, UsageError
from roundexport.runtime.speech.features import LogMel, read_features
from roundexport.runtime.speech.resampling import resample
from roundexport.runtime.speech.wav import Sound, read_wav

RATE = 16_000
TONE = np.sin(2 * np.pi * 440 * np.arange(1600) / RATE) * 0.7


@pytest.mark.parametrize(
    ("kind", "bits", "error"), [(1, 8, 4e-3), (1, 16, 2e-5), (1, 24, 1e-7), (1, 32, 1e-7), (3, 32, 1e-7), (3, 64, 1e-7)]
)
@pytest.mark.parametrize("extensible", [False, True])
def test_samples_of_every_form_are_read(kind: int, bits: int, error: float, extensible: bool) -> None:
    found = read_wav(wav(TONE, kind, bits, extensible=extensible))
    assert found.rate == RATE and found.samples.dtype == np.float32
    np.testing.assert_allclose(found.samples, TONE, atol=error)


def test_what_the_standard_library_writes_is_read(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(np.array([[100, 300], [-200, -400]], "<i2").tobytes())
    found = read_wav(tmp_path / "a.wav")
    assert (found.rate, (found.samples * 32768).tolist()) == (8000, [200.0, -300.0])


def test_other_chunks_and_lengths_that_nobody_knew_are_no_matter() -> None:
    for given in (
        wav(TONE, between=b"LIST\x03\x00\x00\x00abc\x00"),
        wav(TONE, size=0xFFFFFFFF),  # written into a pipe
        wav(TONE, size=0),
        wav(TONE) + b"id3 \x04\x00\x00\x00abcd",
    ):
        np.testing.assert_allclose(read_wav(given).samples, TONE, atol=2e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (b"", "RIFF"),
        (b"ID3\x04" + bytes(40), "MP3"),
        (b"fLaC" + bytes(40), "FLAC"),
        (wav(TONE)[:1000], "cut off"),
        (wav(TONE)[:36], "no chunk 'data'"),
        (wav(TONE[:0]), "no samples"),
        (wav(TONE, rate=0), "0 samples per second"),
        (wav(TONE, rate=10**9), "samples per second"),
        (wav(TONE).replace(struct.pack("<HH", 1, 1), struct.pack("<HH", 7, 1), 1), "format 7"),
        (wav(TONE).replace(struct.pack("<HH", 1, 1), struct.pack("<HH", 1, 0), 1), "0 channels"),
        (wav(np.array([0.5, np.nan]), 3, 32), "not numbers"),
        (wav(np.array([0.5, 1e300]), 3, 64), "not numbers"),
    ],
)  # fmt: skip
def test_what_is_no_sound_is_refused_with_its_reason(given: bytes, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_wav(given)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.wav"):
        read_wav(tmp_path / "gone.wav")


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000, 22051])
def test_a_tone_keeps_its_shape_at_another_rate(rate: int) -> None:
    at = np.arange(rate // 4) / rate
    found = resample(Sound(np.sin(2 * np.pi * 1000 * at).astype(np.float32), rate), RATE)
    assert len(found) == -(-len(at) * RATE // rate)
    inside = slice(400, len(found) - 400)
    wanted = np.sin(2 * np.pi * 1000 * np.arange(len(found)) / RATE)
    np.testing.assert_allclose(found[inside], wanted[inside], atol=2e-4)


@pytest.mark.parametrize("rate", [22050, 44100, 48000])
def test_what_is_too_high_does_not_come_back_as_another_tone(rate: int) -> None:
    for tone in (8100, 9000, rate / 2 - 500):
        sound = np.sin(2 * np.pi * tone * np.arange(rate // 4) / rate).astype(np.float32)
        assert np.abs(resample(Sound(sound, rate), RATE)[400:-400]).max() < 1e-4, tone


def test_up_to_most_of_the_band_passes_as_it_was() -> None:
    at = np.arange(12000) / 48000
    for tone in (50, 4000, 7200):
        found = resample(Sound(np.sin(2 * np.pi * tone * at).astype(np.float32), 48000), RATE)
        wanted = np.sin(2 * np.pi * tone * np.arange(len(found)) / RATE)
        np.testing.assert_allclose(found[400:-400], wanted[400:-400], atol=1e-3)


@pytest.mark.parametrize("bands", [80, 128])
def test_features_are_those_of_transformers(bands: int) -> None:
    draw = np.random.default_rng(0)
    loudness = np.repeat(draw.uniform(0.0, 1.0, 8), 4000).astype(np.float32)
    speech = draw.normal(0, 0.1, len(loudness)).astype(np.float32) * loudness**3
    theirs = WhisperFeatureExtractor(feature_size=bands)
    ours = LogMel(feature_size=bands)
    np.testing.assert_allclose(ours.filters.T, theirs.mel_filters, atol=1e-9)
    wanted = theirs._np_extract_fbank_features(np.pad(speech, (0, 480_000 - len(speech)))[None], "cpu")[0]
    found = ours.window_of(speech)
    assert found.shape == (bands, ours.window) == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    torchs = theirs(speech, sampling_rate=RATE, return_tensors="np")["input_features"][0]
    np.testing.assert_allclose(found, torchs, atol=1e-5)


def test_features_of_a_long_sound_do_not_depend_on_how_they_are_cut() -> None:
    sound = np.random.default_rng(1).normal(0, 0.1, 35 * RATE).astype(np.float32)
    theirs = WhisperFeatureExtractor()
    wanted = theirs(sound, sampling_rate=RATE, return_tensors="np", truncation=False)["input_features"][0]
    np.testing.assert_allclose(LogMel().of(sound), wanted, atol=1e-5)


def test_sizes_are_read_from_either_file(tmp_path: Path) -> None:
    theirs = WhisperFeatureExtractor(feature_size=128)
    theirs.save_pretrained(tmp_path)
    assert read_features(tmp_path) == LogMel(feature_size=128)
    text = (tmp_path / "preprocessor_config.json").read_text()
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(f'{{"feature_extractor": {text}}}')
    assert read_features(tmp_path) == LogMel(feature_size=128)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("{}", ArtifactError),
        ('{"feature_size": true}', ArtifactError),
        ('{"hop_length": 0}', ArtifactError),
        ('{"hop_length": 60000, "chunk_length": 1}', ArtifactError),
        ('{"feature_extractor_type": "Speech2TextFeatureExtractor"}', UnsupportedError),
        ('{"dither": 1e-5}', UnsupportedError),
    ],
)
def test_features_that_make_no_sense_are_refused(tmp_path: Path, given: str, error: type[RoundexportError]) -> None:
    (tmp_path / "preprocessor_config.json").write_text(given)
    with pytest.raises(error):
        read_features(tmp_path)
