"""What the ONNX tests share: artifacts made by plain rounding, packages, sessions, the torch model to compare with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torchlib_once  # noqa: F401  # makes exports cheaper
from numpy.typing import NDArray
from plain_rounding import round_to_nearest
from weight_matrices import weight_matrices

from roundexport.formats.artifact import Artifact
from roundexport.formats.artifact_writer import ArtifactWriter
from roundexport.model.artifact_source import artifact_source
from roundexport.model.checkpoint import Checkpoint
from roundexport.quant.spec import LinearInfo, QuantSpec
from roundexport.targets.interface import ExportReport
from roundexport.targets.onnx import OnnxSettings, export


def write_artifact(
    model: Path,
    out: Path,
    spec: QuantSpec | Callable[[LinearInfo], QuantSpec],
    embedding: QuantSpec | None = None,
    keep_float: tuple[str, ...] = (),
) -> Artifact:
    """Linears of the blocks in one scheme, or each in its own; token embedding and lm_head in another, or float."""
    checkpoint = Checkpoint.open(model)
    matrices = weight_matrices(checkpoint)
    layers: list[tuple[LinearInfo, QuantSpec]] = []
    for info in matrices:
        own = spec if isinstance(spec, QuantSpec) else spec(info)
        chosen = embedding if info.name == "lm_head" else own
        if info.kind == "linear" and chosen is not None and not any(part in info.name for part in keep_float):
            layers.append((info, chosen))
    if embedding is not None:
        layers.insert(0, (next(info for info in matrices if info.kind == "embedding"), embedding))
    out.mkdir(parents=True)
    writer = ArtifactWriter(out, layers)
    for info, chosen in layers:
        weight = checkpoint.float32(f"{info.name}.weight")
        turned = weight.T if info.name.startswith("transformer.h.") else weight  # GPT-2's Conv1D
        writer.add(info.name, round_to_nearest(np.ascontiguousarray(turned), chosen))
    writer.finish(
        source=artifact_source(checkpoint), algorithm={"name": "rtn", "settings": {}}, calibration={}, versions={}
    )
    return Artifact.open(out)


def write_package(artifact: Artifact, out: Path, **settings: Any) -> ExportReport:
    """Export into a fresh folder."""
    out.mkdir(parents=True)
    return export(artifact, Checkpoint.open(artifact.manifest.source["location"]), out, OnnxSettings(**settings))


def record_losses(artifact: Path, losses: dict[str, object]) -> None:
    """Put losses into an artifact's manifest, as tuning does."""
    path = artifact / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["algorithm"]["settings"]["activations"] = {"losses": losses, "sharing": []}
    path.write_text(json.dumps(manifest))


def dequantized_model(artifact: Artifact) -> torch.nn.Module:
    """The transformers model with the artifact's dequantized weights put in."""
    model = Checkpoint.open(artifact.manifest.source["location"]).load_model()
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name in artifact.names():
            weight = torch.tensor(artifact.linear(name).dequantize())
            conv = type(modules[name]).__name__ == "Conv1D"
            modules[name].weight.copy_(weight.T if conv else weight)
    return model


def session(package: Path, accuracy_level: int) -> ort.InferenceSession:
    """A session on the package's graph with every MatMulNBits at this accuracy level."""
    model = onnx.load(package / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = accuracy_level
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(package))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class Decoder:
    """A decoder session with its cache, growing past into present."""

    def __init__(self, graph: ort.InferenceSession, batch: int) -> None:
        self._graph = graph
        self._names = [value.name for value in graph.get_inputs()]
        past = [value for value in graph.get_inputs() if value.name.startswith("past_key_values")]
        self.cache = {v.name: np.zeros((batch, v.shape[1], 0, v.shape[3]), np.float32) for v in past}

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [B, S, V] of new tokens [B, S]; mask [B, T] counts all tokens of a row so far."""
        feed = {"input_ids": ids, "attention_mask": mask, **self.cache}
        if "position_ids" in self._names:
            first = (
                mask.sum(1, keepdims=True) - ids.shape[1] if ids.shape[1] == 1 else np.zeros((len(ids), 1), np.int64)
            )
            feed["position_ids"] = first + np.arange(ids.shape[1])
        logits, *present = self._graph.run(None, feed)
        self.cache = dict(zip(self.cache, present, strict=True))
        return np.asarray(logits)


def relative_rms(got: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Root mean square of the difference over that of the expected values; prints it for the log."""
    value = float(np.sqrt(np.square(got - expected).mean() / np.square(expected).mean()))
    print(
        f"relative rms {value:.2e}, max difference {np.abs(got - expected).max():.2e}, max {np.abs(expected).max():.2e}"
    )
    return value


def greedy(package: Path, prompt: NDArray[np.int64], count: int) -> list[int]:
    """Prompt [1, S] and the likeliest tokens after it, from the package's graph in ONNX Runtime."""
    decoder, tokens = Decoder(session(package, 4), 1), prompt[0].tolist()
    new = prompt
    for _ in range(count):
        logits = decoder.run(new, np.ones((1, len(tokens)), np.int64))
        tokens.append(int(logits[0, -1].argmax()))
        new = np.array([tokens[-1:]], np.int64)
    return tokens


def genai_greedy(package: Path, prompt: NDArray[np.int64], count: int) -> list[int]:
    """The same from onnxruntime-genai, which loads the folder as it is."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(package))
    assert genai.Tokenizer(model).encode("a").size > 0
    parameters = genai.GeneratorParams(model)
    length = prompt.shape[1] + count
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt[0].astype(np.int32))
    for _ in range(count):
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]
