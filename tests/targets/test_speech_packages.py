"""A tiny Whisper with random weights on both runtimes: the very tokens that transformers' own `generate` writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from conftest import tuned
from roundexport.errors import UsageError
from roundexport.formats.artifact import Artifact
from roundexport.formats.package import read_package, write_manifest
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.dequantized_model import DequantizedModel
from roundexport.runtime import Sound, SpeechSettings, Transcriber, load
from roundexport.targets.export import export
from roundexport.targets.onnx.speech_client import write_audio_processor

END, START, NO_TIMES = 340, 341, 342  # of 384 tokens; the 41 behind them are times, a window has 40 steps of 2 frames
HEARD = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 16, "hop_length": 200, "chunk_length": 1}
SAID = {
    "decoder_start_token_id": START, "eos_token_id": END, "pad_token_id": END, "no_timestamps_token_id": NO_TIMES,
    "suppress_tokens": [7, 8, START, NO_TIMES], "begin_suppress_tokens": [9, END], "max_initial_timestamp_index": 10,
    "max_length": 64,
}  # fmt: skip
SOUND = Sound(np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32), 16_000)


Shared = Callable[[str, Callable[[Path], object]], Path]


def made(models: Callable[[str], Path], shared: Shared, target: str) -> tuple[Path, Path]:
    """Artifact and package, as tests of other pairs make them."""
    model = models("whisper, one block")
    artifact = shared("whisper-pair", lambda folder: tuned(model, folder, algorithm="rtn", bits=8, group_size=32))
    return artifact, shared(f"whisper-pair-{target}", lambda folder: export(artifact, folder, to=target))


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_as_shipped_rows_and_sessions_do_not_mix(target: str, models: Callable[[str], Path], shared: Shared) -> None:
    assert_rows_do_not_mix(load(made(models, shared, target)[1]))


def test_rows_do_not_mix_for_clients_that_ask_for_no_cache(
    models: Callable[[str], Path], shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vendors' clients compile the file as it is; the plugin's own 8 bits are wrong beside cross-attention."""
    monkeypatch.setattr("roundexport.runtime.engines._ov_properties._CROSS", {})
    package = load(made(models, shared, "openvino")[1])
    assert_rows_do_not_mix(package)


@pytest.mark.parametrize("precision", ["f16", "bf16"])
def test_a_cache_that_was_asked_for_is_the_one_in_effect(
    precision: str, models: Callable[[str], Path], shared: Shared
) -> None:
    package = load(made(models, shared, "openvino")[1], properties={"KV_CACHE_PRECISION": precision})
    assert package.info()["precision"]["kv_cache"] == precision
    assert_rows_do_not_mix(package)


@pytest.mark.parametrize("name", ["KV_CACHE_PRECISION", "KEY_CACHE_PRECISION", "VALUE_CACHE_PRECISION"])
def test_a_cache_with_which_rows_would_be_wrong_is_refused(
    name: str, models: Callable[[str], Path], shared: Shared
) -> None:
    with pytest.raises(UsageError, match=f"{name} u8: beside cross-attention .* takes f32, f16, bf16"):
        load(made(models, shared, "openvino")[1], properties={name: "u8"})


def assert_rows_do_not_mix(package: Any) -> None:
    features = np.random.default_rng(1).normal(0, 1, (2, 16, 80)).astype(np.float32)
    answers = np.random.default_rng(2).integers(4, 384, (2, 8))

    def steps(rows: list[int]) -> Any:
        with package.backend.start(package.backend.encode({"input_features": features[rows].copy()})) as session:
            return np.concatenate([session.step(answers[rows, at : at + 1]) for at in range(answers.shape[1])], 1)

    alone = np.concatenate([steps([0]), steps([1])])
    np.testing.assert_allclose(steps([0, 1]), alone, atol=0.1 * alone.std())
    np.testing.assert_allclose(steps([1, 0])[::-1], alone, atol=0.1 * alone.std())


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_the_tokens_are_those_of_transformers(
    target: str,
    models: Callable[[str], Path],
    shared: Shared,
    tmp_path: Path,
) -> None:
    artifact, package = made(models, shared, target)
    folder = shutil.copytree(package, tmp_path / "package")
    manifest = replace(read_package(folder), tokens={"bos": None, "eos": (END,), "pad": END})
    (folder / "generation_config.json").write_text(json.dumps(SAID))
    (folder / "preprocessor_config.json").write_text(json.dumps(HEARD))
    write_manifest(folder, manifest)
    opened = load(folder, precise=True)
    assert isinstance(opened, Transcriber)
    artifact_opened = Artifact.open(artifact)
    whole = DequantizedModel(artifact_opened, Checkpoint.open(str(artifact_opened.manifest.source["location"]))).model
    features = torch.from_numpy(opened.features.window_of(SOUND.samples))[None]
    for timestamps in (False, True):
        found = opened.transcribe(SOUND, SpeechSettings(timestamps=timestamps, no_speech=None))
        settings = GenerationConfig(**SAID, return_timestamps=timestamps)
        wanted = whole.generate(input_features=features, generation_config=settings)[0].tolist()
        words = [token for token in wanted if token < END]
        tokens = [token for piece in found.segments for token in piece.tokens]
        assert tokens[: len(words)] == words and len(words) > 1, timestamps


def test_onnxruntime_genai_is_told_how_sounds_become_features(tmp_path: Path) -> None:
    write_audio_processor(tmp_path)
    assert not list(tmp_path.iterdir())
    sizes = {"feature_size": 128, "n_fft": 400, "hop_length": 160, "chunk_length": 30}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": 16_000, **sizes}))
    write_audio_processor(tmp_path)
    told = json.loads((tmp_path / "audio_processor_config.json").read_text())["feature_extraction"]["sequence"]
    assert [step["operation"]["type"] for step in told] == ["AudioDecoder", "STFTNorm", "LogMelSpectrum"]
    assert told[2]["operation"]["attrs"] == {"chunk_size": 30, "hop_length": 160, "n_fft": 400, "n_mel": 128}
