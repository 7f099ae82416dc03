"""WAV files, and a speech package without a model: its backend writes what a script says, window by window."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import runtime_toys as toys

from roundexport.formats.package import PackageManifest
from roundexport.runtime.transcription import Transcriber

END, START, ENGLISH, GERMAN, TRANSLATE, TRANSCRIBE, BEFORE, NOBODY, NO_TIMES = range(toys.VOCAB, toys.VOCAB + 9)
TIMES = NO_TIMES + 1
VOCABULARY = TIMES + 1501
GENERATION: dict[str, Any] = {
    "decoder_start_token_id": START,
    "no_timestamps_token_id": NO_TIMES,
    "prev_sot_token_id": BEFORE,
    "lang_to_id": {"<|en|>": ENGLISH, "<|de|>": GERMAN},
    "task_to_id": {"translate": TRANSLATE, "transcribe": TRANSCRIBE},
    "begin_suppress_tokens": [END],
}


class Scripted:
    """A backend: the n-th window's transcript is the n-th of the script.

    Args:
        script: tokens of every window, the end left out.
        heard: language that it hears.
        nobody: logit of the token that says that nobody speaks.
        sure: logit of every token of the script; others have about 0.
    """

    def __init__(
        self, script: Sequence[Sequence[int]], heard: int = GERMAN, nobody: float = 0.0, sure: float = 30.0
    ) -> None:
        self.script, self.heard, self.nobody, self.sure = script, heard, nobody, sure
        self.slow_s = 0.0
        self.steps = 0
        self.windows: list[Any] = []
        self.prompts: list[list[int]] = []

    def encode(self, inputs: Mapping[str, Any]) -> Any:
        self.windows.append(inputs["input_features"])
        return len(self.windows) - 1

    def start(self, encoded: Any, beams: int = 1) -> _Session:
        return _Session(self, self.script[min(encoded, len(self.script) - 1)])

    def info(self) -> dict[str, Any]:
        return {"engine": "scripted"}


class _Session:
    def __init__(self, backend: Scripted, script: Sequence[int]) -> None:
        self._backend, self._script = backend, [*script, END]
        self.length = 0

    def step(self, ids: Any, order: Sequence[int] | None = None) -> Any:
        if not self.length:
            self._backend.prompts.append(ids[0].tolist())
        self._backend.steps += 1
        time.sleep(self._backend.slow_s)
        logits = np.random.default_rng(self.length).normal(0, 0.1, (1, ids.shape[1], VOCABULARY)).astype(np.float32)
        logits[0, 0, NOBODY] += 0.0 if self.length or ids.shape[1] == 1 else self._backend.nobody
        alone = ids.shape[1] == 1 and not self.length
        place = 0 if not self.length else self.length - len(self._backend.prompts[-1]) + 1
        logits[0, -1, self._backend.heard if alone else self._script[place]] += self._backend.sure
        self.length += ids.shape[1]
        return logits

    def close(self) -> None:
        pass

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def transcriber(folder: Path, backend: Scripted, **generation: Any) -> Transcriber:
    """An opened package with that backend."""
    folder.mkdir(parents=True, exist_ok=True)
    toys.write_tokenizer(folder)
    said = {
        "config.json": {"max_source_positions": 1500},
        "generation_config.json": {**GENERATION, **generation},
        "preprocessor_config.json": {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80},
        "tokenizer_config.json": {},
    }
    for name, values in said.items():
        (folder / name).write_text(json.dumps(values))
    values: dict[str, Any] = {
        "target": "onnx", "task": "transcribe", "model_file": "m", "model_type": "whisper", "kv": (),
        "vocab_size": VOCABULARY, "hidden_size": 8, "max_context": 64, "pooling": None, "settings": {},
        "tokens": {"bos": None, "eos": (END,), "pad": END},
        "source": {"location": "toy", "digest": "0" * 64, "artifact": "0" * 64, "calibration": {}}, "layers": {},
        "kept_float": (), "fusions": {}, "versions": {},
        "files": {name: {"size": 1, "sha256": "0" * 64} for name in (*said, "tokenizer.json")},
    }  # fmt: skip
    return Transcriber(backend, PackageManifest(**values), folder)


def stored(samples: np.ndarray, kind: int, bits: int) -> bytes:
    if kind == 3:
        return samples.astype(f"<f{bits // 8}").tobytes()
    if bits == 8:
        return np.round(samples * 128 + 128).clip(0, 255).astype(np.uint8).tobytes()
    whole = np.round(samples * 2.0 ** (bits - 1)).clip(-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1).astype("<i8")
    return b"".join(int(x).to_bytes(8, "little", signed=True)[: bits // 8] for x in whole)


def wav(samples: np.ndarray, kind: int = 1, bits: int = 16, rate: int = 16_000, *, size: int | None = None,
        between: bytes = b"", extensible: bool = False) -> bytes:  # fmt: skip
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    data = stored(samples.reshape(-1), kind, bits)
    named = 0xFFFE if extensible else kind
    moment = channels * bits // 8
    head = struct.pack("<HHIIHH", named, channels, rate, rate * moment, moment, bits)
    if extensible:
        head += struct.pack("<HHIH14s", 22, bits, 0, kind, b"\x00\x00\x00\x00\x10\x00\x80\x00\x00\xaa\x00\x38\x9b\x71")
    head = b"fmt " + struct.pack("<I", len(head)) + head + between
    body = head + b"data" + struct.pack("<I", len(data) if size is None else size) + data
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body
