"""An artifact as an ONNX package: capture, lower, prove, describe.

The folder is complete when `roundexport.json` is there; it is written last, after every layer's integers were read back
from the files and found equal to the artifact's.
"""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from pathlib import Path

from roundexport.errors import ArtifactError
from roundexport.formats.artifact import Artifact
from roundexport.formats.package import read_package, write_manifest
from roundexport.graph.kept_captures import capture_once
from roundexport.model.checkpoint import Checkpoint
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec
from roundexport.targets.interface import ExportReport
from roundexport.targets.package_manifest import TargetHalf, package_layers, package_manifest
from roundexport.targets.weight_source import WeightSource

from . import client
from .decoder_attention import cache_width
from .lowering import lower
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
    captured = capture_once(checkpoint, artifact.overrides(), settings.max_context, pooled=settings.pooled)
    specs = {name: artifact.entry(name).spec for name in artifact.names()}
    lowered = lower(
        captured,
        WeightSource(artifact, checkpoint, captured.transposed),
        specs,
        out,
        settings.accuracy_level,
        captured.max_context,
    )
    prove(out / MODEL_FILE, artifact, lowered.used)
    checkpoint.copy_side_files(out)
    own = TargetHalf(
        target="onnx",
        model_file=MODEL_FILE,
        settings={
            "accuracy_level": settings.accuracy_level,
            "max_context": captured.max_context,
            "device": settings.device,
            **({"pooled": True} if settings.pooled else {}),
        },
        layers=package_layers(artifact, {name: lowered.forms[name].describe() for name in artifact.names()}),
        float_layers=dict.fromkeys(lowered.float_layers, "not tuned"),
        fusions=lowered.log.fusions,
        versions={library: version(library) for library in _VERSIONS},
        cache_widths=tuple(cache_width(info) for info in captured.attentions),
    )
    manifest = package_manifest(artifact, checkpoint, captured, own)
    if captured.task == "generate" and not captured.states:  # onnxruntime-genai has its own wishes for each such family
        sizes = {
            "vocab_size": manifest.vocab_size,
            "hidden_size": manifest.hidden_size,
            "num_attention_heads": captured.attentions[0].num_heads,
            "max_context": captured.max_context,
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
