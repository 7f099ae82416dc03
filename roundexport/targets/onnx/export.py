"""An artifact as an ONNX package: capture, lower, prove, describe.

A model with an encoder and a decoder becomes two graphs, encoder_model.onnx and decoder_with_past_model.onnx, and a
third on the same data, decoder_model.onnx, for clients that want it (first_step.py).  The folder is complete when
`roundexport.json` is there; it is written last, after every layer's integers were read back from the files and found
equal to the artifact's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from roundexport.errors import ArtifactError
from roundexport.formats.artifact import Artifact
from roundexport.formats.package import read_package, write_manifest
from roundexport.graph.capture import Capture
from roundexport.graph.parts import captures
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.vision_part import has_features
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec
from roundexport.targets.interface import ExportReport
from roundexport.targets.package_manifest import INTEGER_INPUTS, TargetHalf, package_layers, package_manifest
from roundexport.targets.spared import Spared, recorded, spared_by
from roundexport.targets.weight_source import WeightSource
from roundexport.types import EMBEDS, PAIRS

from . import client, speech_client
from .decoder_attention import cache_width
from .first_step import write_first_step
from .float_products import slowdown
from .integer_linears import RULE
from .linears import AccuracyLevels
from .lowering import Lowered, joined, lower
from .readback import decode_layers
from .settings import DECODER_FILE, ENCODER_FILE, FIRST_FILE, MODEL_FILE, ROWS_FILE, VISION_FILE, OnnxSettings

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
        UsageError: a longer context than the model has, or an activation_time that would do nothing.
        ArtifactError: a layer of the artifact is not in the model, or the proof failed.
    """
    idle = "" if settings.accuracy_level == 4 and not settings.standard else "its products have one precision"
    spared = spared_by(artifact, settings.activation_time, slowdown, idle)
    programs = captures(
        checkpoint,
        artifact.overrides(),
        settings.max_context,
        cross=True,
        pooled=settings.pooled,
        embeds=settings.inputs_embeds,
    )
    captured = programs[-1]
    specs = {name: artifact.entry(name).spec for name in artifact.names()}
    graphs = {
        file_of(program, checkpoint): _lowered(program, artifact, checkpoint, out, specs, settings, spared)
        for program in programs
    }
    lowered = joined(list(graphs.values()))
    used = {out / name: graph.used for name, graph in graphs.items()}
    if captured.half is not None:
        used[out / FIRST_FILE] = write_first_step(out) + graphs[DECODER_FILE].used
    prove(artifact, used)
    checkpoint.copy_side_files(out)
    own = TargetHalf(
        target="onnx",
        model_file=file_of(captured, checkpoint),
        settings={
            "accuracy_level": settings.accuracy_level,
            "max_context": captured.max_context,
            "device": settings.device,
            **{name: True for name in ("pooled", EMBEDS, "kernels") if getattr(settings, name)},
            "dialect": settings.dialect,
            **recorded(spared),
            **({INTEGER_INPUTS: True} if lowered.log.fusions[RULE] else {}),
        },
        layers=package_layers(artifact, lowered.forms),
        float_layers=dict.fromkeys(lowered.float_layers, "not tuned"),
        fusions=lowered.log.fusions,
        versions={library: version(library) for library in _VERSIONS},
        cache_widths=tuple(cache_width(info) for info in captured.attentions if info.kind == "cached"),
    )
    manifest = package_manifest(artifact, checkpoint, captured, own)
    sizes = {
        "vocab_size": manifest.vocab_size,
        "hidden_size": manifest.hidden_size,
        "num_attention_heads": captured.attentions[0].num_heads if captured.attentions else 0,
        "max_context": captured.max_context,
    }
    if (
        captured.task == "generate" and not captured.states and captured.stage is None
    ):  # onnxruntime-genai has its own wishes for each such family
        client.write_genai_config(
            out, checkpoint.model_type, manifest.tokens, manifest.kv, lowered.inputs, sizes, settings
        )
    elif captured.task == "transcribe":
        speech_client.write_genai_config(out, manifest.tokens, manifest.kv, sizes)
        speech_client.write_audio_processor(out)
    written = write_manifest(out, manifest)
    return ExportReport(
        target="onnx",
        exported=tuple(artifact.names()),
        kept_float=manifest.kept_float,
        fusions=manifest.fusions,
        refused=tuple(lowered.log.refused),
        files={name: entry["size"] for name, entry in written.files.items()},
        notes=(*captured.notes, *([spared.note()] if spared.layers else [])),
    )


def file_of(captured: Capture, checkpoint: Checkpoint) -> str:
    """Name of the file that a program is written to."""
    if checkpoint.part == "vision" and has_features(checkpoint.config):
        return VISION_FILE
    if captured.half is None:
        return ROWS_FILE if captured.stage == "embedding" else MODEL_FILE
    return ENCODER_FILE if captured.half.name == "encoder" else DECODER_FILE


def _lowered(
    captured: Capture,
    artifact: Artifact,
    checkpoint: Checkpoint,
    out: Path,
    specs: dict[str, QuantSpec],
    settings: OnnxSettings,
    spared: Spared,
) -> Lowered:
    weights = WeightSource(artifact, checkpoint, captured.transposed)
    levels, length = AccuracyLevels(settings.accuracy_level, spared.layers, settings.kernels), captured.max_context
    return lower(captured, weights, specs, out, levels, length, file_of(captured, checkpoint), settings.dialect)


def prove(artifact: Artifact, used: Mapping[Path, tuple[str, ...]]) -> None:
    """Read every layer back from the written files and hold it against the artifact.

    Args:
        artifact: what was exported.
        used: graph -> layers in it, once for every place they are written.

    Raises:
        ArtifactError: a layer is missing, more than once in a graph, or differs in any integer or scale.
    """
    twice = sorted(name for names in used.values() for name, count in Counter(names).items() if count > 1)
    missing = sorted(set(artifact.names()).difference(*used.values()))
    if twice or missing:
        what = f"{twice[0]} is written more than once" if twice else f"{missing[0]} is not in the model's graph"
        raise ArtifactError(f"{artifact.path}: the layer {what}")
    for path, names in used.items():
        found = set()
        for name, linear in decode_layers(path, {name: artifact.entry(name).spec for name in artifact.names()}):
            if not linear.equals(artifact.linear(name)):
                raise ArtifactError(f"{path}: the integers of {name} are not those of the artifact")
            found.add(name)
        if lost := sorted(set(names) - found):
            raise ArtifactError(f"{path}: the layer {lost[0]} is not in the written graph")


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
    files = [ENCODER_FILE] if manifest.task in PAIRS else [ROWS_FILE] if manifest.settings.get(EMBEDS) else []
    found = {
        name: linear for file in (*files, manifest.model_file) for name, linear in decode_layers(folder / file, specs)
    }
    missing = sorted(set(specs) - set(found))
    if missing:
        raise ArtifactError(f"{folder}: the layer {missing[0]} of the manifest is not in the graph")
    return found
