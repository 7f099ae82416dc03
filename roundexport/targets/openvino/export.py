"""Artifact to OpenVINO package: lower, save, read back and compare, client files, manifest last.

    openvino_model.xml/.bin          the graph; weights exactly the artifact's integers.  Of a model with an encoder
                                     and a decoder: openvino_encoder_model.xml and openvino_decoder_model.xml
    openvino_tokenizer.xml/.bin …    for openvino_genai and OpenVINO Model Server
    config.json, tokenizer.json, …   copied from the source
    roundexport.json                 manifest with the hash of every file

Memory: torch for the capture, and one layer being copied; the graph's constants, all packed weights once, lie in a file
(constant_file.py) and take the package's size of disk until it is saved.

Compile-time defaults are left to the plugin and can be set by whoever compiles: CPU plugins keep the KV cache in u8 and
quantize activations dynamically where the instruction set allows it.  The exception is 2-bit weights: u2 has no kernel
for that on bfloat16 machines, so such a package turns dynamic quantization off in its own runtime options, without
which the vendor's pipelines fail at the first token there.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import openvino as ov

from roundexport.errors import ArtifactError, UnsupportedError
from roundexport.formats.artifact import Artifact
from roundexport.formats.package import PackageLayer, write_manifest
from roundexport.model.vision_part import has_features
from roundexport.quant.spec import LinearInfo
from roundexport.targets.interface import ExportReport
from roundexport.targets.package_manifest import INTEGER_INPUTS, TargetHalf, package_layers, package_manifest
from roundexport.targets.spared import Spared, recorded, spared_by
from roundexport.targets.weight_source import WeightSource
from roundexport.types import EMBEDS, GRID

from .clients import write_client_files
from .constant_file import constants_in
from .constants import stored_type
from .float_products import slowdown
from .graph import Graph
from .integer_linear import RULE
from .lowering import lower
from .readback import (
    DECODER_FILE,
    ENCODER_FILE,
    LANGUAGE_FILE,
    MERGER_FILE,
    MODEL_FILE,
    POSITIONS_FILE,
    ROWS_FILE,
    VISION_FILE,
    found_layers,
)
from .saving import save
from .settings import OpenVinoSettings, refusal

if TYPE_CHECKING:
    from roundexport.graph.capture import Capture
    from roundexport.model.checkpoint import Checkpoint


_STAGES = {
    "embedding": ROWS_FILE,
    "language": LANGUAGE_FILE,
    "patches": VISION_FILE,
    "positions": POSITIONS_FILE,
    "merger": MERGER_FILE,
}


def export(artifact: Artifact, checkpoint: Checkpoint, out: Path, settings: OpenVinoSettings) -> ExportReport:
    """Write an artifact as an OpenVINO package.

    Args:
        artifact: the integers.
        checkpoint: the float model they came from.
        out: an existing, empty folder; the caller makes the write atomic.
        settings: see :class:`OpenVinoSettings`.

    Raises:
        UnsupportedError: a layer is refused, or the model cannot be captured or converted.
        UsageError: max_context is beyond the model's.
        ArtifactError: the written graph does not hold every layer's integers exactly once.
    """
    from roundexport.graph.capture import VERSIONS
    from roundexport.graph.grid_stages import grid_sizes
    from roundexport.graph.parts import captures

    _check_refusals(artifact)
    spared = _spared(artifact, settings)
    programs = captures(
        checkpoint,
        artifact.overrides(),
        settings.max_context,
        pooled=settings.pooled,
        embeds=settings.inputs_embeds,
        lists=True,
    )
    captured = programs[-1]
    graphs = [_written(program, artifact, checkpoint, out, settings.device, spared) for program in programs]
    layers = _package_layers(artifact, graphs)
    for program, graph in zip(programs, graphs, strict=True):
        _prove(
            artifact,
            program,
            out / file_of(program, checkpoint),
            {name: layers[name] for name in artifact.names() if name in graph.used},
        )
    fusions = sum((graph.fusions for graph in graphs), Counter[str]())
    refused = [*(one for graph in graphs for one in graph.refused), *write_client_files(checkpoint, out)]
    own = TargetHalf(
        target="openvino",
        model_file=file_of(captured, checkpoint),
        settings={
            "device": settings.device,
            "max_context": settings.max_context,
            **{name: True for name in ("pooled", EMBEDS) if getattr(settings, name)},
            **recorded(spared),
            **({INTEGER_INPUTS: True} if fusions[RULE] else {}),
            **({GRID: grid_sizes(captured.config)} if captured.stage == "merger" else {}),
        },
        layers=layers,
        float_layers={name: reason for graph in graphs for name, reason in graph.kept_float.items()},
        fusions=fusions,
        versions={"openvino": ov.__version__, **VERSIONS},
    )
    manifest = write_manifest(out, package_manifest(artifact, checkpoint, captured, own))
    return ExportReport(
        target="openvino",
        exported=tuple(layers),
        kept_float=manifest.kept_float,
        fusions=dict(fusions),
        refused=tuple(refused),
        files={name: entry["size"] for name, entry in manifest.files.items()},
        notes=(*captured.notes, *([spared.note()] if spared.layers else [])),
    )


def file_of(captured: Capture, checkpoint: Checkpoint) -> str:
    """Name of the file that a program is written to."""
    if captured.stage is not None:
        return _STAGES[captured.stage]
    if checkpoint.part == "vision" and has_features(checkpoint.config):
        return VISION_FILE
    if captured.half is None:
        return MODEL_FILE
    return ENCODER_FILE if captured.half.name == "encoder" else DECODER_FILE


def _written(
    captured: Capture, artifact: Artifact, checkpoint: Checkpoint, out: Path, device: str, spared: Spared
) -> Graph:
    """Lower a program and save it; returns what became of its parts, without the nodes."""
    graph = Graph(captured, WeightSource(artifact, checkpoint, captured.transposed), device, frozenset(spared.layers))
    with constants_in(out):
        model = lower(graph)
        _set_runtime_options(model, graph)
        save(model, out / file_of(captured, checkpoint))
        del model
        graph.release()
        gc.collect()
    return graph


def _spared(artifact: Artifact, settings: OpenVinoSettings) -> Spared:
    """Layers whose activations stay floats; none where the plugin rounds none: with u2, or on a GPU, another plugin."""
    entries = [artifact.entry(name) for name in artifact.names()]
    stored = {stored_type(entry.spec, entry.info.in_features, entry.info.kind, settings.device) for entry in entries}
    idle = "a GPU's plugin decides by itself" if settings.device != "cpu" else ""
    if "u2" in stored:
        idle = "beside 2-bit codes all activations stay floats"
    return spared_by(artifact, settings.activation_time, slowdown, idle)


def _check_refusals(artifact: Artifact) -> None:
    for name in artifact.names():
        entry = artifact.entry(name)
        reason = refusal(entry.info, entry.spec)
        if reason:
            raise UnsupportedError(f"{name} ({entry.spec.describe()}): {reason}")


def _set_runtime_options(model: ov.Model, graph: Graph) -> None:
    if any(stored.startswith("u2") for stored in graph.used.values()):
        model.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    if graph.capture.half is not None and graph.capture.half.name == "decoder":
        # In 8 bits, the plugin's default, every row but the first is wrong from the second run on (2026.4.1).
        model.set_rt_info("f16", ["runtime_options", "KV_CACHE_PRECISION"])


def _package_layers(artifact: Artifact, graphs: Sequence[Graph]) -> dict[str, PackageLayer]:
    """What the manifest says of every artifact layer.

    Raises:
        ArtifactError: a layer is not in the graph: the model's output does not depend on it.
    """
    used = {name: stored for graph in graphs for name, stored in graph.used.items()}
    unused = [name for name in artifact.names() if name not in used]
    if unused:
        raise ArtifactError(
            f"{len(unused)} tuned layers are not in the exported graph, the first is {unused[0]}: "
            f"the model's {graphs[-1].capture.output} does not depend on it; tune without it"
        )
    return package_layers(artifact, used)


def _prove(artifact: Artifact, captured: Capture, path: Path, layers: dict[str, PackageLayer]) -> None:
    """Compare what the written files hold with the artifact, layer by layer.

    Raises:
        ArtifactError: a layer differs, or is read by other nodes than those that stand for its modules.
    """
    uses = captured.uses()
    for name, found in found_layers(path, layers):
        if not found.linear.equals(artifact.linear(name)):
            raise ArtifactError(f"{path}: the integers of {name} differ from the artifact's")
        info = artifact.entry(name).info
        expected = _expected_users(info, uses, captured)
        if dict(found.users) != expected:
            raise ArtifactError(f"{path}: {name} is read by {dict(found.users)}, expected {expected}")


def _expected_users(info: LinearInfo, uses: Counter[str], captured: Capture) -> dict[str, int]:
    products = sum(uses[name] for name in (info.name, *info.shared_with))
    looked_up = info.kind == "embedding" and captured.stage != "language"
    return {**({"Gather": 1} if looked_up else {}), **({"MatMul": products} if products else {})}
