"""Files of a package that transcribes for onnxruntime-genai's Whisper: how to run it, and how sounds become features.

    genai_config.json              names of tensors and files, which are free
    audio_processor_config.json    AudioDecoder, STFTNorm, LogMelSpectrum with the sizes of the feature extractor

It runs the encoder once, hands its keys and values of cross-attention to every step of the decoder, and lets the
decoder's own cache grow.  Its features are those of transformers but for the first frame and the two at a sound's end,
where it pads otherwise.
Source: whisper.cpp, config.cpp and models/builders/whisper.py of onnxruntime-genai 0.18.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from roundexport.formats.package import Tokens
from roundexport.types import KvLayer

from .settings import DECODER_FILE, ENCODER_FILE


def write_genai_config(out: Path, special: Tokens, kv: tuple[KvLayer, ...], sizes: dict[str, int]) -> None:
    """Write genai_config.json.

    Args:
        out: package folder.
        special: special token ids.
        kv: the decoder's attention layers.
        sizes: ``vocab_size``, ``hidden_size``, ``num_attention_heads``, ``max_context``.
    """
    eos = list(special["eos"])
    pad = special["pad"] if special["pad"] is not None else (eos[0] if eos else 0)
    both: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "head_size": kv[0]["head_dim"],
        "hidden_size": sizes["hidden_size"],
        "num_attention_heads": sizes["num_attention_heads"],
        "num_hidden_layers": len(kv),
        "num_key_value_heads": kv[0]["num_kv_heads"],
    }
    encoder = {
        **both,
        "filename": ENCODER_FILE,
        "inputs": {"audio_features": "input_features"},
        "outputs": {
            "encoder_hidden_states": "last_hidden_state",
            "cross_present_key_names": "present.%d.encoder.key",
            "cross_present_value_names": "present.%d.encoder.value",
        },
    }
    decoder = {
        **both,
        "filename": DECODER_FILE,
        "inputs": {
            "input_ids": "input_ids",
            "past_key_names": "past_key_values.%d.decoder.key",
            "past_value_names": "past_key_values.%d.decoder.value",
            "cross_past_key_names": "past_key_values.%d.encoder.key",
            "cross_past_value_names": "past_key_values.%d.encoder.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.decoder.key",
            "present_value_names": "present.%d.decoder.value",
        },
    }
    model = {
        "bos_token_id": special["bos"] if special["bos"] is not None else pad,
        "context_length": sizes["max_context"],
        "decoder": decoder,
        "encoder": encoder,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": pad,
        "type": "whisper",
        "vocab_size": sizes["vocab_size"],
    }
    search = {"do_sample": False, "max_length": sizes["max_context"], "past_present_share_buffer": False}
    text = json.dumps({"model": model, "search": search}, indent=4)
    (out / "genai_config.json").write_text(text + "\n", encoding="utf-8")


def write_audio_processor(out: Path) -> None:
    """Write audio_processor_config.json, where the package folder has a feature extractor's config.

    Args:
        out: package folder, side files included.
    """
    if not any((out / name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
        return
    from roundexport.runtime.speech.features import read_features

    sizes = read_features(out)
    frames: dict[str, Any] = {"n_fft": sizes.n_fft, "frame_length": sizes.n_fft, "hop_length": sizes.hop_length}
    mel = {
        "chunk_size": sizes.chunk_length,
        "hop_length": sizes.hop_length,
        "n_fft": sizes.n_fft,
        "n_mel": sizes.feature_size,
    }
    steps: list[tuple[str, str, dict[str, Any]]] = [
        ("audio_decoder", "AudioDecoder", {}),
        ("STFT", "STFTNorm", {"attrs": frames}),
        ("log_mel_spectrogram", "LogMelSpectrum", {"attrs": mel}),
    ]
    sequence = [{"operation": {"name": name, "type": kind, **attrs}} for name, kind, attrs in steps]
    text = json.dumps({"feature_extraction": {"sequence": sequence}}, indent=4)
    (out / "audio_processor_config.json").write_text(text + "\n", encoding="utf-8")
