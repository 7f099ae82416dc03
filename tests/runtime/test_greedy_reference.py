"""Greedy tokens of packages are those of transformers with the artifact's weights: 20 prompts of 64 tokens each.

Both sides compute in float32 (``precise``); what differs is the order of sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_support import dequantized_model

from roundexport.formats.artifact import Artifact
from roundexport.runtime.writing import load_decoder

PROMPTS, TOKENS = 20, 64


@functools.cache
def reference(artifact: Path, vocabulary: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and what transformers writes behind them."""
    random = np.random.default_rng(0)
    lengths = [1 + 3 * number for number in range(PROMPTS)]
    prompts = [random.integers(4, vocabulary, length).tolist() for length in lengths]
    model = dequantized_model(Artifact.open(artifact)).eval()
    model.generation_config.eos_token_id = None  # go on after it, as the packages are told to
    found = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0
            )
            found.append(out[0, len(prompt) :].tolist())
    return prompts, found


@pytest.mark.parametrize("family", ["llama", pytest.param("sample", marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_greedy_tokens_are_those_of_transformers(
    packages: Callable[[str, str], tuple[Path, Path]], family: str, target: str
) -> None:
    artifact, package = packages(family, target)
    decoder = load_decoder(package, threads=1, precise=True)
    prompts, wanted = reference(artifact, decoder.manifest.vocab_size)
    assert len({tuple(tokens) for tokens in wanted}) == PROMPTS and all(len(tokens) == TOKENS for tokens in wanted)
    together = [tokens.tolist() for tokens in decoder.greedy(prompts, TOKENS)]
    alone = [decoder.greedy([prompt], TOKENS)[0].tolist() for prompt in prompts[:4]]
    assert together == wanted and alone == wanted[:4]
