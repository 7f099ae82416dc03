"""For the OpenVINO tests: artifacts of round-to-nearest weights in plain numpy, and running a package's graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from plain_rounding import round_to_nearest
from weight_matrices import weight_matrices

from roundexport.formats.artifact import Artifact
from roundexport.formats.artifact_writer import ArtifactWriter
from roundexport.formats.package import read_package
from roundexport.model.checkpoint import Checkpoint
from roundexport.quant.spec import LinearInfo, QuantSpec
from roundexport.targets import openvino as target
from roundexport.targets.interface import ExportReport

# Everything in float32: what is left is the order of sums.
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    "INFERENCE_NUM_THREADS": 2,
}
INT4 = QuantSpec(4, 32, True)
INT8_ROW = QuantSpec(8, None, True)


def make_artifact(
    checkpoint: Checkpoint,
    folder: Path,
    spec_of: Callable[[LinearInfo], QuantSpec | None],
    overrides: dict[str, NDArray[np.float32]] | None = None,
    poolers: bool = False,
) -> Artifact:
    """Quantize what `spec_of` gives a spec for: linears, poolers only if asked, and embeddings; tied heads once."""
    layers = [(info, spec) for info in weight_matrices(checkpoint, poolers) if (spec := spec_of(info)) is not None]
    folder.mkdir(parents=True)
    writer = ArtifactWriter(folder, layers)
    for info, spec in layers:
        weight = checkpoint.float32(f"{info.name}.weight")
        turned = weight.T if info.name.startswith("transformer.h.") else weight  # GPT-2's Conv1D
        writer.add(info.name, round_to_nearest(turned, spec))
    for name, values in (overrides or {}).items():
        writer.add_override(name, values)
    writer.finish(
        source={
            "location": checkpoint.location, "model_type": checkpoint.model_type, "task": checkpoint.task,
            "digest": checkpoint.digest, "files": checkpoint.files(),
        },
        algorithm={"name": "rtn", "settings": {}},
        calibration={},
        versions={},
        side_files=checkpoint.copy_side_files(folder),
    )  # fmt: skip
    return Artifact.open(folder)


def usual(info: LinearInfo) -> QuantSpec | None:
    """Linears in 4 bits, lm_head and token embeddings in 8, the rest float."""
    if info.kind == "embedding":
        return INT8_ROW if info.name.rsplit(".", 1)[-1] in TOKEN_TABLES else None
    return INT8_ROW if info.name == "lm_head" else INT4


TOKEN_TABLES = {"embed_tokens", "wte", "word_embeddings", "tok_embeddings"}


class Package:
    """A model, its artifact and the package made from it."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        spec_of: Callable[[LinearInfo], QuantSpec | None] = usual,
        settings: target.OpenVinoSettings | None = None,
    ) -> None:
        self.checkpoint = Checkpoint.open(model)
        self.artifact = make_artifact(self.checkpoint, folder / "artifact", spec_of)
        self.folder = folder / "package"
        self.folder.mkdir()
        self.report = target.export(self.artifact, self.checkpoint, self.folder, settings or target.OpenVinoSettings())

    @classmethod
    def opened(cls, artifact: Path, folder: Path) -> Package:
        """A package that was made before, with what its manifest tells of the export."""
        package = cls.__new__(cls)
        package.artifact, package.folder = Artifact.open(artifact), folder
        package.checkpoint = Checkpoint.open(package.artifact.manifest.source["location"])
        manifest = read_package(folder)
        package.report = ExportReport(
            target="openvino", exported=tuple(manifest.layers), kept_float=manifest.kept_float,
            fusions=manifest.fusions, refused=(), files={name: file["size"] for name, file in manifest.files.items()},
        )  # fmt: skip
        return package

    @property
    def decodes(self) -> bool:
        return self.checkpoint.task == "generate"

    @cached_property
    def compiled(self) -> ov.CompiledModel:
        return ov.Core().compile_model(self.folder / "openvino_model.xml", "CPU", EXACT)

    @cached_property
    def reference(self) -> torch.nn.Module:
        """The transformers model with the dequantized weights put in."""
        model = self.checkpoint.load_model()
        with torch.no_grad():
            for name in self.artifact.names():
                module = model.get_submodule(name)
                weight = torch.from_numpy(self.artifact.linear(name).dequantize())
                turned = weight.T if type(module).__name__ == "Conv1D" else weight
                module.weight.copy_(turned)  # type: ignore[operator, union-attr]
        return model


def run_steps(compiled: ov.CompiledModel, feed: dict[str, NDArray[Any]], cuts: list[int]) -> NDArray[np.float32]:
    """Run a decoder on pieces of [B, S] inputs, keeping its state, or an encoder on the whole; outputs joined."""
    request = compiled.create_infer_request()
    names = {port.get_any_name() for port in compiled.inputs}
    rows, length = feed["input_ids"].shape
    outputs = []
    for start, end in zip([0, *cuts], [*cuts, length], strict=True):
        piece = {name: values[:, start:end] for name, values in feed.items()}
        piece["attention_mask"] = feed["attention_mask"][:, :end]
        piece["beam_idx"] = np.arange(rows, dtype=np.int32)
        request.infer({name: np.ascontiguousarray(values) for name, values in piece.items() if name in names})
        outputs.append(request.get_output_tensor(0).data.copy())
    return np.concatenate(outputs, 1)


def layer_types(compiled: ov.CompiledModel) -> dict[str, list[Any]]:
    """Nodes of the compiled model by the plugin's own type."""
    nodes: dict[str, list[Any]] = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        nodes.setdefault(node.get_rt_info()["layerType"].astype(str), []).append(node)
    return nodes


def stored_in(node: Any) -> list[str]:
    """Types of what a compiled node reads."""
    parents = [port.get_source_output().get_node() for port in node.inputs()]
    return [parent.get_rt_info()["outputPrecisions"].astype(str) for parent in parents]


def original_names(node: Any) -> list[str]:
    """Names of the graph's nodes that a compiled node stands for; of a product of several layers theirs."""
    names = node.get_rt_info()["originalLayersNames"].astype(str).split(",")
    return [layer for name in names for layer in name.split("+")]
