"""What a report is made from: packages with whatever was recorded about them, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roundexport.formats.artifact_manifest import Manifest
from roundexport.formats.package import PackageManifest


@dataclass(frozen=True)
class Missing:
    """Something that was not recorded, and the command that records it."""

    what: str
    command: str


@dataclass(frozen=True)
class Provenance:
    """What the source says of itself; nothing here is a guess.

    Args:
        name: what the source is called: its hub id, or the name of its folder or file.
        license: identifier, or None.
        license_name: where the license is ``other``, its name.
        license_link: where its text is.
        base_model: hub id of the model, or of what the source says that it came from.
        relation: how the package stands to ``base_model``: ``quantized``, or None where that is not known.
        languages: codes.
        said_by: where license and base model were read.
    """

    name: str
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_model: str | None = None
    relation: str | None = None
    languages: tuple[str, ...] = ()
    said_by: str | None = None


@dataclass(frozen=True)
class Timing:
    """One contestant of a benchmark at one shape.

    Args:
        contestant: its name in the benchmark.
        package: name of its package's folder, or None.
        engine: what ran it.
        shape: prompt_len and output_len, or text_len and batch_size.
        row: its summarized figures.
        gaps: milliseconds between tokens (decoders), or per call (encoders).
        machine: what it ran on.
        settings: rounds, threads and so on.
        info: what the engine says of itself.
    """

    contestant: str
    package: str | None
    engine: str
    shape: Mapping[str, Any]
    row: Mapping[str, Any]
    gaps: tuple[float, ...]
    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def speed(self) -> Any:
        """Tokens (decoders) or texts (encoders) per second."""
        return self.row.get("decode_tps", self.row.get("texts_per_s"))

    @property
    def conditions(self) -> tuple[Any, ...]:
        """What must be equal for two speeds to be compared: shape, machine, threads, precision."""
        asked = tuple(self.settings.get(key) for key in ("threads", "device", "precise"))
        return (*sorted(self.shape.items()), self.machine.get("cpu"), *asked)

    def told(self) -> str:
        """The shape in words."""
        rows = self.shape.get("batch_size", 1)
        if "prompt_len" in self.shape:
            together = "" if rows == 1 else f", {rows} together"
            return f"{self.shape['prompt_len']} tokens in, {self.shape.get('output_len')} out{together}"
        return f"{self.shape.get('text_len')} tokens, {rows} text{'' if rows == 1 else 's'} per call"


@dataclass(frozen=True)
class PackageRecord:
    """One package.

    Args:
        label: what the report calls it.
        folder: where it is.
        manifest: what it says of itself.
        artifact: the manifest of the artifact it was made from, or None.
        verification: what `verify` found, or None.
        source: what its source says of itself.
        timings: of it, in the benchmarks given.
        missing: what was not recorded.
    """

    label: str
    folder: Path
    manifest: PackageManifest
    artifact: Manifest | None
    verification: Mapping[str, Any] | None
    source: Provenance
    timings: tuple[Timing, ...] = ()
    missing: tuple[Missing, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(entry["size"] for entry in self.manifest.files.values())

    @property
    def bits_per_weight(self) -> float | None:
        """All bits of the quantized layers over their weights; None without the artifact or such layers."""
        if self.artifact is None or not self.artifact.layers:
            return None
        shapes = [(layer.spec, layer.info.out_features, layer.info.in_features) for layer in self.artifact.layers]
        return sum(spec.storage_bits(n, k) for spec, n, k in shapes) / sum(n * k for _, n, k in shapes)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Quantized and float layers, in the model's order where it is known."""
        known = [] if self.artifact is None else [layer.info.name for layer in self.artifact.layers]
        return tuple(dict.fromkeys([*known, *self.manifest.layers, *(name for name, _ in self.manifest.kept_float)]))
