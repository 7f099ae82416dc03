"""An artifact as an ONNX package: capture, lower, prove, describe.

The folder is complete when `roundexport.json` is there; it is written last, after every layer's integers were read back
from the files and found equal to the artifact's.
"""

from __future__ import annotations

import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from roundexport.errors import ArtifactError
from roundexport.formats.artifact import Artifact
from roundexport.formats.package import PackageLayer, PackageManifest, package_source, read_package, write_manifest
from roundexport.graph.capture import Capture, capture
from roundexport.model.checkpoint import Checkpoint
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec
from roundexport.targets.interface import ExportReport
from roundexport.targets.weight_source import WeightSource
from roundexport.types import KvLayer

from . import client
from .lowering import Lowered, lower
from .readback import decode_layers
from .settings import MODEL_FILE, OnnxSettings

_VERSIONS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")


def export(artifact: Artifact, checkpoint: Checkpoint, out: Path, settings: OnnxSettings) -> ExportReport:
    """Write an ONNX package into an existing, empty folder.

    Args:
        artifact: the tuned layers.
        checkpoint: the float model they came from.
        out: the folder to fill.
        settings: see :class:`OnnxSettings`.

    Returns:
        What was exported, kept float, fused and written.

    Raises:
        UnsupportedError: the model's structure cannot be captured or lowered.
        UsageError: a longer context than the model has.
        ArtifactError: a layer of the artifact is not in the model, or the proof failed.
    """
    captured = capture(checkpoint, artifact.overrides(), settings.max_context)
    max_context = captured.max_context
    specs = {name: artifact.entry(name).spec for name in artifact.names()}
    lowered = lower(
        captured,
        WeightSource(artifact, checkpoint, captured.transposed),
        specs,
        out,
        settings.accuracy_level,
        max_context,
    )
    prove(out / MODEL_FILE, artifact, lowered.used)
    checkpoint.copy_side_files(out)
    manifest = _manifest(artifact, checkpoint, captured, lowered, settings, max_context)
    if captured.task == "generate":
        sizes = {
            "vocab_size": manifest.vocab_size,
            "hidden_size": manifest.hidden_size,
            "num_attention_heads": captured.attentions[0].num_heads,
            "max_context": max_context,
        }
        client.write_genai_config(out, checkpoint.model_type, manifest.tokens, manifest.kv, lowered.inputs, sizes)
    written = write_manifest(out, manifest)
    return ExportReport(
        target="onnx",
        exported=tuple(artifact.names()),
        kept_float=manifest.kept_float,
        fusions=manifest.fusions,
        refused=tuple(lowered.log.refused),
        files={name: entry["size"] for name, entry in written.files.items()},
        notes=captured.notes,
    )


def prove(model_path: Path, artifact: Artifact, used: tuple[str, ...]) -> None:
    """Read every layer back from the written files and hold it against the artifact.

    Raises:
        ArtifactError: a layer is missing, there more than once, or differs in any integer or scale.
    """
    twice = sorted(name for name, count in Counter(used).items() if count > 1)
    missing = sorted(set(artifact.names()) - set(used))
    if twice or missing:
        what = f"{twice[0]} is written more than once" if twice else f"{missing[0]} is not in the model's graph"
        raise ArtifactError(f"{artifact.path}: the layer {what}")
    found = set()
    for name, linear in decode_layers(model_path, {name: artifact.entry(name).spec for name in artifact.names()}):
        if not linear.equals(artifact.linear(name)):
            raise ArtifactError(f"{model_path}: the integers of {name} are not those of the artifact")
        found.add(name)
    if lost := sorted(set(artifact.names()) - found):
        raise ArtifactError(f"{model_path}: the layer {lost[0]} is not in the written graph")


def read_back(folder: Path) -> dict[str, QuantizedLinear]:
    """Integers of every quantized layer, decoded from a written package.

    Args:
        folder: an ONNX package.

    Returns:
        Artifact layer name -> its codes, scales and zero points, in the artifact's own bits and groups.

    Raises:
        ArtifactError: the package breaks its format, or a layer is missing.
    """
    manifest = read_package(folder, check_hashes=False)
    specs = {
        name: QuantSpec(layer["bits"], layer["group_size"], layer["symmetric"])
        for name, layer in manifest.layers.items()
    }
    found = dict(decode_layers(folder / manifest.model_file, specs))
    missing = sorted(set(specs) - set(found))
    if missing:
        raise ArtifactError(f"{folder}: the layer {missing[0]} of the manifest is not in the graph")
    return found


def _manifest(
    artifact: Artifact,
    checkpoint: Checkpoint,
    captured: Capture,
    lowered: Lowered,
    settings: OnnxSettings,
    max_context: int,
) -> PackageManifest:
    decoder = captured.task == "generate"
    text_config = captured.config.get_text_config()
    return PackageManifest(
        target="onnx",
        task=checkpoint.task,
        model_file=MODEL_FILE,
        model_type=checkpoint.model_type,
        kv=_kv(captured) if decoder else (),
        vocab_size=int(text_config.vocab_size),
        hidden_size=int(text_config.hidden_size),
        max_context=max_context,
        tokens=client.tokens(checkpoint.config, _generation_config(checkpoint)),
        pooling=None if decoder else checkpoint.pooling(),
        settings={"accuracy_level": settings.accuracy_level, "max_context": max_context, "device": settings.device},
        source=package_source(artifact),
        layers={name: _layer(artifact, name, lowered) for name in artifact.names()},
        kept_float=_kept_float(artifact, captured, lowered),
        fusions=dict(sorted(lowered.log.fusions.items())),
        versions={library: version(library) for library in _VERSIONS},
    )


def _kv(captured: Capture) -> tuple[KvLayer, ...]:
    return tuple(
        {"layer": info.index, "num_kv_heads": info.num_kv_heads, "head_dim": info.head_dim}
        for info in captured.attentions
    )


def _layer(artifact: Artifact, name: str, lowered: Lowered) -> PackageLayer:
    spec = artifact.entry(name).spec
    return {
        "bits": spec.bits,
        "group_size": spec.group_size,
        "symmetric": spec.symmetric,
        "stored": lowered.forms[name].describe(),
    }


def _kept_float(artifact: Artifact, captured: Capture, lowered: Lowered) -> tuple[tuple[str, str], ...]:
    """Every linear and embedding of the model that is not quantized, with the reason."""
    reasons = dict(artifact.manifest.kept_float)
    quantized = {name for layer in artifact.names() for name in (layer, *artifact.entry(layer).info.shared_with)}
    kept = []
    for info in (*captured.linears, *captured.embeddings):
        if info.name in quantized:
            continue
        in_graph = info.name in lowered.float_layers
        kept.append(
            (info.name, reasons.get(info.name, "not tuned") if in_graph else "the output does not depend on it")
        )
    return tuple(kept)


def _generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.folder / "generation_config.json"
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return loaded
