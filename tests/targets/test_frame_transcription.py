"""Packages that write down sounds frame by frame: Wav2Vec2ForCTC of both norms, beside transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from speech_toys import wav

from roundexport.calibration.samples import load_calibration
from roundexport.calibration.waveforms import drawn_samples
from roundexport.conversion.tune import tune
from roundexport.errors import RoundexportError, UsageError
from roundexport.formats.artifact import Artifact
from roundexport.model.checkpoint import Checkpoint
from roundexport.runtime import FrameTranscriber, Sound, SpeechSettings, load
from roundexport.runtime import frame_transcription as module
from roundexport.targets.check import dry_run
from roundexport.targets.export import export
from roundexport.tuning.settings import TuneSettings

CONVOLUTIONS = {"conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 4], "num_conv_pos_embeddings": 8,
                "num_conv_pos_embedding_groups": 2}  # fmt: skip
SIZES = {"vocab_size": 12, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIH"]
SECOND = 16_000


def build(folder: Path, norm: str, old: bool = False) -> tuple[Any, Any]:
    """A model of random weights and its processor; ``old``: names as in files of older torch, nothing for training."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        **SIZES, **CONVOLUTIONS, feat_extract_norm=norm, do_stable_layer_norm=norm == "layer"
    )
    model = transformers.Wav2Vec2ForCTC(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.25 / parameter.std())
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({letter: place for place, letter in enumerate(LETTERS)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    prepared = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer")
    processor = transformers.Wav2Vec2Processor(prepared, tokenizer)
    processor.save_pretrained(folder)
    if old:
        stored = {
            name.replace("parametrizations.weight.original0", "weight_g").replace(
                "parametrizations.weight.original1", "weight_v"
            ): tensor
            for name, tensor in load_file(folder / "model.safetensors").items()
            if not name.endswith("masked_spec_embed")
        }
        assert any(name.endswith("weight_g") for name in stored)
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return model, processor


@pytest.mark.parametrize(("target", "norm"), [("onnx", "group"), ("openvino", "layer")])
def test_it_writes_what_transformers_writes(
    target: str, norm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = build(tmp_path / "m", norm, old=target == "onnx")
    export(tmp_path / "m", tmp_path / "p", to=target, progress=False)
    package = load(tmp_path / "p", precise=True)
    assert isinstance(package, FrameTranscriber)
    long, short = 0.3 * drawn_samples(2, 4000, 1)
    short = short[:2345]
    # What was trained with a mask is padded and masked there; here a sound goes by itself.
    together = [[long, short]] if norm == "layer" else [[long], [short]]
    told = []
    for sounds in together:
        inputs = processor(sounds, sampling_rate=SECOND, return_tensors="pt", padding=True)
        with torch.no_grad():
            told += list(model(**inputs).logits.numpy())
    for sound, wanted in zip((long, short), told, strict=True):
        found = package.logits(sound)
        assert np.abs(found - wanted[: len(found)]).max() < 1e-4 * wanted.std()
        decoded = processor.batch_decode(wanted[None, : len(found)].argmax(-1))[0]
        text = re.sub(r"<[a-z/]+>", "", decoded)  # transformers writes its unknown word out
        transcript = package.transcribe(Sound(sound, SECOND))
        assert transcript.text == " ".join(text.split())
        assert [segment.text.strip() for segment in transcript.segments] == text.split()
    assert package.transcribe(wav(long)).segments[-1].end <= 0.25
    with pytest.raises(UsageError, match="no language"):
        package.transcribe(Sound(long, SECOND), SpeechSettings(language="de"))
    with pytest.raises(UsageError, match="at least 20 of them"):
        package.logits(long[:19])
    for name, seconds in (("_WHOLE", 2), ("_WINDOW", 3), ("_OVERLAP", 1)):
        monkeypatch.setattr(module, name, seconds)
    sound = drawn_samples(1, 5 * SECOND, 2)[0]
    parts = list(package._windows(sound))
    assert len(parts) > 2 and sum(map(len, parts)) == len(package.logits(sound))


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("vocab.json", '{"eng": {"a": 0}, "deu": {"a": 0}}', "several languages"),
        ("vocab.json", "{}", r"no vocab\.json"),
        ("processor_config.json", '{"feature_extractor": {"feature_extractor_type": "Other"}}', "prepared by Other"),
        ("config.json", '"add_adapter": true', "add_adapter"),
    ],
)
def test_what_transcribe_could_not_read_is_refused_before_tuning(
    file: str, text: str, why: str, tmp_path: Path
) -> None:
    build(tmp_path / "m", "group")
    if file == "config.json":
        text = (tmp_path / "m" / file).read_text().replace('"add_adapter": false', text)
    (tmp_path / "m" / file).write_text(text)
    refused = dry_run(Checkpoint.open(tmp_path / "m"), ["onnx", "openvino"]).refused
    assert len(refused) == 2 and all(re.search(why, said) for said in refused.values())
    with pytest.raises(RoundexportError, match=why):
        export(tmp_path / "m", tmp_path / "p", to="onnx", progress=False)


def test_tuning_reads_windows_of_sounds(tmp_path: Path) -> None:
    build(tmp_path / "m", "group")
    checkpoint = Checkpoint.open(tmp_path / "m")
    with pytest.raises(UsageError, match=r"give a folder of \.wav files"):
        load_calibration(checkpoint, "self")
    (tmp_path / "s").mkdir()
    for number, samples in enumerate(0.2 * drawn_samples(2, 3000, 3)):
        (tmp_path / "s" / f"{number}.wav").write_bytes(wav(samples))
    found = load_calibration(checkpoint, str(tmp_path / "s"), num_samples=9, sample_len=64)
    assert found.ids.shape == (4, 64 * 20) and "holds 4 windows" in found.notes[0]
    settings = TuneSettings(group_size=32, calibration=str(tmp_path / "s"), num_samples=4, sample_len=64)
    rounded = Artifact.open(tune(tmp_path / "m", tmp_path / "a", settings, progress=False))
    assert len(rounded.names()) == 12 and rounded.manifest.calibration["kind"] == "sounds"
