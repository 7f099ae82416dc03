"""What is in a folder: a model and what each scheme would make of it, an artifact, or a package."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roundexport.errors import UsageError
from roundexport.model.tensor_names import is_table
from roundexport.progress import Progress
from roundexport.quant.spec import QuantSpec

if TYPE_CHECKING:
    from roundexport.formats.artifact import Artifact
    from roundexport.model.checkpoint import Checkpoint

SCHEMES = (QuantSpec(8, 128), QuantSpec(4, 128), QuantSpec(4, 32), QuantSpec(3, 128, False), QuantSpec(2, 64, False))


@dataclass(frozen=True)
class Inspection:
    """One folder, described.

    Args:
        kind: ``model``, ``artifact`` or ``package``.
        facts: name -> value, in the order to print.
        rows: a table, one mapping per row (schemes of a model, layers of an artifact or package).
    """

    kind: str
    facts: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The description as a JSON object."""
        return {"kind": self.kind, "facts": self.facts, "rows": self.rows}


def inspect(path: str | Path, part: str | None = None, progress: bool | Progress = True) -> Inspection:
    """Describe a model, artifact or package folder.

    Args:
        path: the folder, or a GGUF file or hub id of a model.
        part: ``text`` or ``vision`` of a model folder that holds several; None: the one that is exported.
        progress: report on stderr, or where to report, while a model is fetched or a GGUF file is dequantized.

    Returns:
        Facts, and a table: for a model which targets take it (or why not), the size under each scheme, and where
        it runs fast.

    Raises:
        UsageError: the folder is none of the three.
        ArtifactError, CheckpointError: it is one, and damaged.
    """
    folder = Path(path)
    if (folder / "roundexport.json").is_file():
        return _package(folder)
    if (folder / "manifest.json").is_file():
        return _artifact(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder} is not a model (config.json), artifact (manifest.json) or package (roundexport.json) folder"
        )
    return _model(str(path), part, progress)


def _model(location: str, part: str | None, progress: bool | Progress) -> Inspection:
    from roundexport.model.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(location, part=part, progress=progress)
    shapes = checkpoint.owned()
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    tables = {name for name in matrices if is_table(name)}
    weights = {name: shape for name, shape in matrices.items() if name not in tables}
    facts = {
        "model": checkpoint.location,
        "type": f"{checkpoint.model_type} ({checkpoint.task})",
        **_quantized(checkpoint),
        "parameters": sum(_count(shape) for shape in shapes.values()),
        "linear weights": sum(_count(shape) for shape in weights.values()),
        "embedding weights": sum(_count(matrices[name]) for name in tables),
        "MiB as float16": round(2 * sum(_count(shape) for shape in shapes.values()) / 2**20, 1),
        **_exports(checkpoint),
    }
    if checkpoint.imported is not None:
        return Inspection("model", facts, _imported_rows(checkpoint))
    return Inspection("model", facts, [_scheme_row(scheme, list(weights.values())) for scheme in SCHEMES])


def _quantized(checkpoint: Checkpoint) -> dict[str, str]:
    """How others have quantized it."""
    from .importing import said

    told = "; ".join(said(checkpoint)).removeprefix(f"{checkpoint.location} is ")
    return {"quantized": told} if told else {}


def _imported_rows(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """One row per scheme of the layers that others have quantized."""
    from .importing import imported_layers

    groups: dict[QuantSpec, list[tuple[int, int]]] = {}
    for info, spec in imported_layers(checkpoint):
        groups.setdefault(spec, []).append((info.out_features, info.in_features))
    return [
        {
            "scheme": spec.describe(),
            "layers": len(shapes),
            "MiB of linears": round(sum(spec.storage_bits(*shape) for shape in shapes) / 8 / 2**20, 2),
            **{f"on {name}": note for name, note in _speed_notes(spec).items()},
        }
        for spec, shapes in groups.items()
    ]


def _exports(checkpoint: Checkpoint) -> dict[str, str]:
    """Which targets take the model, and why the others do not."""
    from roundexport import plugins
    from roundexport.targets.check import dry_run

    names = plugins.names("targets")
    found = dry_run(checkpoint, names)
    facts = {"exports to": ", ".join(name for name in names if name not in found.refused) or "nothing"}
    facts.update({f"{name} refuses": why for name, why in found.refused.items()})
    return {**facts, "note": "; ".join(found.notes)} if found.notes else facts


def _scheme_row(scheme: QuantSpec, shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    from roundexport.schemes.rules import fitting, other_groups

    used = [(fitting(scheme, shape[1])[0], shape) for shape in shapes]
    bits = sum(spec.storage_bits(*shape) for spec, shape in used)
    weights = sum(_count(shape) for shape in shapes)
    return {
        "scheme": scheme.describe(),
        "MiB of linears": round(bits / 8 / 2**20, 2),
        "bits per weight": round(bits / weights, 3) if weights else None,
        "other groups": other_groups(scheme.group_size, [(spec, shape[1]) for spec, shape in used]) or None,
        **{f"on {name}": note for name, note in _speed_notes(scheme).items()},
    }


def _speed_notes(scheme: QuantSpec) -> dict[str, str]:
    from roundexport import plugins
    from roundexport.targets.interface import load_target

    return {name: load_target(name).speed_note(scheme) for name in plugins.names("targets")}


def _artifact(folder: Path) -> Inspection:
    from roundexport.formats.artifact import Artifact

    artifact = Artifact.open(folder)
    manifest = artifact.manifest
    rows = [
        {
            "layer": entry.info.name,
            "N×K": f"{entry.info.out_features}×{entry.info.in_features}",
            "scheme": entry.spec.describe(),
            "loss before": entry.loss_before,
            "loss after": entry.loss_after,
        }
        for entry in manifest.layers
    ]
    facts = {
        "source": manifest.source["location"],
        "type": f"{manifest.source['model_type']} ({manifest.source['task']})",
        "algorithm": manifest.algorithm["name"],
        "calibration": manifest.calibration.get("kind", "none"),
        "layers": len(rows),
        "kept float": len(manifest.kept_float),
        "bits per weight": round(artifact.bits_per_weight, 4) if rows else None,
        **_sizes(artifact),
    }
    return Inspection("artifact", facts, rows)


def _sizes(artifact: Artifact) -> dict[str, Any]:
    """Bytes by part, for people: parts that are not there and what is not known are left out."""
    from roundexport.model.artifact_size import sizes_at_hand

    found = sizes_at_hand(artifact)
    parts = {
        "bytes of codes": found.codes,
        "bytes of scales": found.scales,
        "of zero points": found.zero_points,
        "of 8-bit vectors": found.vectors,
        "of floats": found.floats,
        "of headers": found.container,
        "bytes in all": found.total,
        "as float32": found.float32,
    }
    ratio = {} if found.ratio is None else {"times smaller": round(found.ratio, 3)}
    told: dict[str, Any] = {**{name: count for name, count in parts.items() if count}, **ratio}
    if found.floats is None:
        told["not known"] = "bytes of floats and in all: the float model is not where the artifact says it was"
    return told


def _package(folder: Path) -> Inspection:
    from roundexport.formats.package import read_package, vision_manifest

    manifest = read_package(folder)
    rows = [{"layer": name, **layer} for name, layer in manifest.layers.items()]
    pictures: dict[str, Any] = {}
    if vision := vision_manifest(manifest):
        kept = f"{len(vision.layers)} layers, kept float {len(vision.kept_float)}"
        pictures = {"pictures": f"read by {vision.model_file}: {kept}"}
        rows += [{"layer": name, **layer} for name, layer in vision.layers.items()]
    facts = {
        "target": manifest.target,
        "type": f"{manifest.model_type} ({manifest.task})",
        "source": manifest.source.get("location"),
        "layers": len(manifest.layers),
        "kept float": len(manifest.kept_float),
        **pictures,
        "max context": manifest.max_context,
        "MiB": round(sum(entry["size"] for entry in manifest.files.values()) / 2**20, 2),
        "fusions": ", ".join(f"{rule} {count}" for rule, count in sorted(manifest.fusions.items())),
    }
    return Inspection("package", facts, rows)


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
