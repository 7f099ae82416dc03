"""Greedy tokens of packages are those of transformers with the artifact's weights: 20 prompts of 64 tokens each.

In every engine, the vendors' loops included.  Both sides compute in float32 (``precise``); what differs is the order of
sums.  See greedy_reading.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from greedy_reading import likeliest, reader
from onnx_support import dequantized_model

from roundexport.formats.artifact import Artifact
from roundexport.runtime import Decoder, load

PROMPTS, TOKENS = 20, 64
ENGINES = {
    "ort": "onnx",
    "onnxruntime_genai": "onnx",
    "ov": "openvino",
    "openvino_genai": "openvino",
    "openvino_genai_batching": "openvino",
}
NEVER_ENDS = ("onnxruntime_genai",)  # it cannot go on behind an end of text, so it never chooses one here


@functools.cache
def model_of(artifact: Path) -> torch.nn.Module:
    """transformers' model with the artifact's weights."""
    return dequantized_model(Artifact.open(artifact)).eval()


@pytest.mark.parametrize(
    ("family", "engine"),
    [
        *(("llama", engine) for engine in ENGINES),
        *(pytest.param("sample", engine, marks=pytest.mark.slow) for engine in ("ort", "ov")),
    ],
)
def test_greedy_tokens_are_those_of_transformers(
    packages: Callable[[str, str], tuple[Path, Path]], family: str, engine: str
) -> None:
    if "genai" in engine:
        pytest.importorskip(engine.removesuffix("_batching"))
    artifact, package = packages(family, ENGINES[engine])
    decoder = load(package, engine=engine, threads=1, precise=True)
    assert isinstance(decoder, Decoder) and decoder.info()["precise"]
    random = np.random.default_rng(0)
    lengths = [1 + 3 * number for number in range(PROMPTS)]
    prompts = [random.integers(4, decoder.manifest.vocab_size, length).tolist() for length in lengths]
    together = [tokens.tolist() for tokens in decoder.greedy(prompts, TOKENS)]
    assert len({tuple(tokens) for tokens in together}) == PROMPTS and all(len(found) == TOKENS for found in together)
    read = reader(model_of(artifact))
    never = decoder.manifest.tokens["eos"] if engine in NEVER_ENDS else ()
    wanted = [likeliest(read, prompt, found, never) for prompt, found in zip(prompts, together, strict=True)]
    assert together == wanted
    assert [decoder.greedy([prompt], TOKENS)[0].tolist() for prompt in prompts[:4]] == wanted[:4]
