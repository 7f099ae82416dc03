"""Real models, and the client that loads a package folder unchanged: onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_support import (
    Decoder,
    dequantized_model,
    genai_greedy,
    greedy,
    relative_rms,
    session,
)

from roundexport.formats.artifact import Artifact
from roundexport.targets.onnx import read_back


@pytest.fixture
def sample_package(packages: Callable[[str, str], tuple[Path, Path]]) -> tuple[Artifact, Path]:
    """The bundled model at 4 bits in groups of 128, embedding and head at 8 bits."""
    artifact, package = packages("sample", "onnx")
    return Artifact.open(artifact), package


def read_ids(model: Path, text: str) -> np.ndarray:
    from tokenizers import Tokenizer

    return np.array([Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids[:64]], np.int64)


# Derived as in test_onnx.py: at level 0 about 40 operations in a row, sqrt(40) * 1.4e-6 = 9e-6; at level 4 four blocks
# of four linears and the head, sqrt(17) * 7e-3 = 2.9e-2, and trained activations have outliers, so twice that.
@pytest.mark.parametrize(("accuracy_level", "limit"), [(0, 1e-5), (4, 6e-2)])
def test_sample_model_gives_the_dequantized_logits(
    sample_package: tuple[Artifact, Path], sample_model: Path, heldout_text: Path, accuracy_level: int, limit: float
) -> None:
    artifact, package = sample_package
    ids = read_ids(sample_model, heldout_text.read_text(encoding="utf-8")[:2000])
    logits = Decoder(session(package, accuracy_level), 1).run(ids, np.ones_like(ids))
    with torch.no_grad():
        expected = dequantized_model(artifact)(input_ids=torch.tensor(ids)).logits.numpy()
    assert relative_rms(logits, expected) < limit
    assert all(linear.equals(artifact.linear(name)) for name, linear in read_back(package).items())


@pytest.mark.parametrize(("accuracy_level", "limit"), [(0, 1e-5), (4, 6e-2)])
def test_mini_lm_gives_the_dequantized_states(
    packages: Callable[[str, str], tuple[Path, Path]], models: Callable[[str], Path], heldout_text: Path,
    accuracy_level: int, limit: float,
) -> None:  # fmt: skip
    model, (opened, package) = models("minilm"), packages("minilm", "onnx")
    artifact = Artifact.open(opened)
    assert all(linear.equals(artifact.linear(name)) for name, linear in read_back(package).items())
    ids = np.repeat(read_ids(model, heldout_text.read_text(encoding="utf-8")[:1000]), 2, 0)
    mask = np.ones_like(ids)
    mask[1, 40:] = 0
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    graph = session(package, accuracy_level)
    hidden = graph.run(None, {value.name: feed[value.name] for value in graph.get_inputs()})[0]
    with torch.no_grad():
        out = dequantized_model(artifact)(**{name: torch.tensor(values) for name, values in feed.items()})
    real = mask.astype(bool)
    assert relative_rms(hidden[real], out.last_hidden_state.numpy()[real]) < limit


def test_genai_generates_our_tokens_from_the_sample_model(
    sample_package: tuple[Artifact, Path], sample_model: Path
) -> None:
    prompt = read_ids(sample_model, "It was a dark evening, and the old man")
    assert genai_greedy(sample_package[1], prompt, 32) == greedy(sample_package[1], prompt, 32)
