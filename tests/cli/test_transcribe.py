"""The verb `transcribe`: words, times, subtitles, JSON, and what it refuses; what the model would write is scripted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import runtime_toys
import speech_toys as toys
from cli_tools import Run
from speech_toys import TIMES, Scripted, transcriber


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    (tmp_path / "said.wav").write_bytes(toys.wav(np.sin(np.arange(8000) / 5) * 0.5, rate=8000))
    return tmp_path / "said.wav"


def hears(script: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`load` gives a package that writes this; the words in it."""
    opened = transcriber(tmp_path / "package", Scripted([script]))
    monkeypatch.setattr("roundexport.runtime.load", lambda *_, **__: opened)
    return opened.tokenizer.decode([token for token in script if token < TIMES]).strip()


def test_words_of_several_files(run: Run, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = hears([40, 41, 42], tmp_path, monkeypatch)
    code, out, err = run("transcribe", "package", sound, sound, "--language", "en")
    assert (code, out.splitlines()) == (0, [words, words]), err


def test_times_and_subtitles(run: Run, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = hears([TIMES, 40, 41, TIMES + 40], tmp_path, monkeypatch)
    code, out, err = run("transcribe", "package", sound, "--timestamps")
    assert (code, out) == (0, f"   0.00 to    0.80  {words}\n"), err
    code, out, err = run("transcribe", "package", sound, "--subtitles", "vtt")
    assert (code, out) == (0, f"WEBVTT\n\n00:00:00.000 --> 00:00:00.800\n{words}\n"), err
    code, out, err = run("transcribe", "package", sound, "--timestamps", "--json")
    found = json.loads(out)
    assert (code, found["text"], found["language"], found["segments"][0]["end"]) == (0, words, "de", 0.8), err


def test_what_is_refused(run: Run, sound: Path, tmp_path: Path) -> None:
    package = runtime_toys.onnx_encoder(tmp_path / "encoder")
    code, _, err = run("transcribe", package, sound)
    assert code == 1 and "does not hear; its task is embed" in err
    code, _, err = run("transcribe", package, sound, "--task", "sing")
    assert code == 2 and "sing" in err
