"""Packages of models with an encoder and a decoder, on both runtimes, against the model that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import tuned
from roundexport.errors import ArtifactError, UsageError
from roundexport.formats.artifact import Artifact
from roundexport.formats.package import read_package
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.dequantized_model import DequantizedModel
from roundexport.runtime.loading import load
from roundexport.runtime.translation import Translator
from roundexport.targets.export import export
from roundexport.targets.interface import load_target

OPTIMUM = ("encoder_model", "decoder_model", "decoder_with_past_model")
Made = Callable[[str, str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def pairs(models: Callable[[str], Path], shared: Callable[[str, Callable[[Path], object]], Path]) -> Made:
    """``pairs("t5", "onnx")``: artifact with 8-bit weights, and package."""

    def get(family: str, target: str) -> tuple[Path, Path]:
        model = models(f"{family}, one block")
        artifact = shared(f"{family}-pair", lambda folder: tuned(model, folder, algorithm="rtn", bits=8, group_size=32))
        return artifact, shared(f"{family}-pair-{target}", lambda folder: export(artifact, folder, to=target))

    return get


def reference(artifact: Path) -> Any:
    """The transformers model with the artifact's weights."""
    opened = Artifact.open(artifact)
    return DequantizedModel(opened, Checkpoint.open(str(opened.manifest.source["location"]))).model


def source(family: str) -> dict[str, Any]:
    """Two texts of unequal length, or two sounds."""
    generator = np.random.default_rng(1)
    if family == "whisper":
        return {"input_features": generator.standard_normal((2, 16, 80)).astype(np.float32)}
    ids, mask = generator.integers(4, 384, (2, 30)), np.ones((2, 30), np.int64)
    ids[1, 19:], mask[1, 19:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("target", ["onnx", "openvino"])
@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_logits_are_those_of_the_model(pairs: Made, family: str, target: str) -> None:
    artifact, folder = pairs(family, target)
    inputs = source(family)
    answers = np.random.default_rng(2).integers(4, 384, (2, 40))
    with torch.no_grad():
        given = {name: torch.from_numpy(values) for name, values in inputs.items()}
        wanted = reference(artifact)(**given, decoder_input_ids=torch.from_numpy(answers)).logits.numpy()
    package: Any = load(folder, precise=True)
    found = package.logits(inputs, answers)
    assert np.abs(found - wanted).max() < 1e-4 * wanted.std()
    with package.backend.start(package.backend.encode(inputs), 2) as session:  # beams that change places at each token
        session.step(np.repeat(answers[:, :20], 2, 0))
        rows = np.stack([answers[0], answers[0], answers[1], answers[1]])
        for at in range(20, 32):
            step = session.step(rows[:, at : at + 1], [1, 0, 3, 2])
            assert np.abs(step[::2, 0] - wanted[:, at]).max() < 1e-4 * wanted.std()
        assert session.length == 32
        with pytest.raises(UsageError, match="of the same source"):
            session.step(rows[:, :1], [2, 3, 0, 1])
        with pytest.raises(UsageError, match="exceed this package's max_context"):
            session.step(np.zeros((4, package.max_length), np.int64))


@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_the_first_step_of_other_clients(pairs: Made, family: str) -> None:
    import onnxruntime

    _, folder = pairs(family, "onnx")
    graphs = {name: onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in OPTIMUM}
    inputs, answers = source(family), np.random.default_rng(2).integers(4, 384, (2, 6))
    hidden = run(graphs["encoder_model"], inputs)
    first = {"input_ids": answers[:, :5], "encoder_hidden_states": hidden["last_hidden_state"]}
    mask = {"encoder_attention_mask": inputs["attention_mask"]} if "attention_mask" in inputs else {}
    given = run(graphs["decoder_model"], first | mask)
    wanted = load(folder).logits(inputs, answers)
    assert np.allclose(given["logits"], wanted[:, :5], atol=1e-4 * wanted.std())
    later = graphs["decoder_with_past_model"]
    caches = [node.name for node in later.get_inputs() if node.name.startswith("past")]
    kinds = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")
    assert caches == [f"past_key_values.0.{kind}" for kind in kinds]  # optimum goes by this order
    past = {name: given[name.replace("past_key_values", "present")] for name in caches}
    found = run(later, {"input_ids": answers[:, 5:6], **past, **mask})["logits"]
    assert np.allclose(found, wanted[:, 5:6], atol=1e-4 * wanted.std())


def run(session: Any, feeds: dict[str, Any]) -> dict[str, Any]:
    return dict(zip((node.name for node in session.get_outputs()), session.run(None, feeds), strict=True))


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_integers_are_in_the_graphs(pairs: Made, target: str) -> None:
    artifact, folder = pairs("t5", target)
    opened, found = Artifact.open(artifact), load_target(target).read_back(folder)
    assert sorted(found) == sorted(opened.names())
    assert all(found[name].equals(opened.linear(name)) for name in found)
    names = [name for name in found if "decoder.block.0" in name]
    assert "decoder.block.0.layer.1.EncDecAttention.k" in names
    assert opened.entry("shared").info.shared_with == ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    manifest = read_package(folder)
    assert manifest.task == "translate" and [layer["layer"] for layer in manifest.kv] == [0]


def test_answers_with_beams_are_those_of_transformers(pairs: Made) -> None:
    artifact, folder = pairs("bart", "onnx")
    inputs, translator = source("bart"), load(folder, precise=True)
    assert isinstance(translator, Translator)
    rows = [ids[mask == 1].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    model = reference(artifact)
    given = {name: torch.from_numpy(values) for name, values in inputs.items()}
    for beams in (1, 4):
        wanted = model.generate(**given, num_beams=beams, max_new_tokens=20, do_sample=False).tolist()
        for answer, expected in zip(translator.answer(rows, 20, beams), wanted, strict=True):
            assert list(answer.tokens) == expected[1 : 1 + len(answer.tokens)]
    (text,) = translator.translate(["The sea was calm."], max_new_tokens=8)
    assert len(text.tokens) <= 8 and text.prompt_tokens > 1
    with pytest.raises(UsageError, match="has no such token"):
        translator.translate(["The sea."], language="xx_XX")


def test_an_encoder_that_was_exchanged_is_seen(pairs: Made, tmp_path: Path) -> None:
    _, folder = pairs("t5", "openvino")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / "openvino_encoder_model.bin").open("r+b") as file:
        file.write(b"changed")
    with pytest.raises(ArtifactError, match=r"openvino_encoder_model\.bin"):
        load(tmp_path)
