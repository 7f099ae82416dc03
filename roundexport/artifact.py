"""The artifact: what tuning hands to export, a folder with integers, scales and a manifest.

    manifest.json                            written last: without it the folder is unfinished
    quantized-00001-of-0000n.safetensors     <layer>.codes        U8       [N, ceil(K·bits/8)]
                                             <layer>.scales       F16|F32|U8  [N, G]
                                             <layer>.zero_points  U8       [N, G], absent exactly when symmetric
    overrides.safetensors                    optional: tensors that tuning changed, by parameter name: F32, or in eight
                                             bits (vectors.py)
    config.json, tokenizer.json, …           copied from the source byte for byte

Float weights that tuning left alone stay in the source, which the manifest names by hash.  Equal inputs, equal bytes:
nothing in here knows the time, the machine's name or the order in which layers were finished.  Specified in FORMAT.md;
the reader refuses everything that deviates (tests/test_artifact_hostile.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from . import powers
from .atomic import FileEntry, check_files, file_entry, read_manifest, replace_file, safe_join, sync_folder
from .errors import ArtifactError, SpecError
from .naming import Task
from .quantized import QuantizedLinear
from .spec import LinearInfo, QuantSpec
from .strictjson import decode, encode, parse_format
from .tensorfile import TensorFile, TensorFileWriter, TensorSpec, write_tensors
from .vectors import Vector8

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

MANIFEST = "manifest.json"
FORMAT = "roundexport/1"
OVERRIDES = "overrides.safetensors"
SHARD_BYTES = 2 << 30
_METADATA = {"format": FORMAT}
_SCALES = {"float16": "F16", "float32": "F32", "exponent8": "U8"}
_CODES8, _EXPONENT8 = ".int8", ".exponent"  # what an override in eight bits adds to its parameter's name


class Source(TypedDict):
    """The float model an artifact was tuned from: where it was, what it is, and the sha256 of its files by name."""

    location: str
    model_type: str
    task: Task
    digest: str
    files: dict[str, str]


class Algorithm(TypedDict):
    """Name and full settings of the tuning algorithm."""

    name: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class LayerEntry:
    """One quantised weight and what tuning did to it; losses are the algorithm's own measure, or None."""

    info: LinearInfo
    spec: QuantSpec
    loss_before: float | None = None
    loss_after: float | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything in `manifest.json`.

    Args:
        source: the float model.
        algorithm: what tuned it.
        calibration: identity of the text it was tuned on.
        layers: the quantised weights, in the model's order.
        kept_float: (layer, reason) of every linear or embedding left float.
        versions: library -> version, of the libraries that the numbers depend on.
        files: every other file of the artifact.
    """

    source: Source
    algorithm: Algorithm
    calibration: dict[str, Any]
    layers: tuple[LayerEntry, ...]
    kept_float: tuple[tuple[str, str], ...]
    versions: dict[str, str]
    files: dict[str, FileEntry] = field(default_factory=dict)
    format: str = FORMAT

    def to_json(self) -> dict[str, Any]:
        """The manifest as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: bytes, where: str = MANIFEST) -> Manifest:
        """Read a manifest's bytes.

        Raises:
            ArtifactError: another format, unknown or missing keys, wrong types, duplicate layers, or a scheme that its
                layer's shape cannot have.
        """
        manifest = decode(cls, parse_format(data, FORMAT, where), where)
        names = [name for entry in manifest.layers for name in (entry.info.name, *entry.info.shared_with)]
        names += [name for name, _ in manifest.kept_float]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) != len(names) else []
        if twice:
            raise ArtifactError(f"{where}: the layer {twice[0]} is listed twice")
        if MANIFEST in manifest.files:
            raise ArtifactError(f"{where}: the manifest lists itself")
        for entry in manifest.layers:
            if entry.info.out_features < 1:
                raise ArtifactError(f"{where}: {entry.info.name}: N={entry.info.out_features} is not positive")
            try:
                entry.spec.groups(entry.info.in_features, entry.info.name)
            except SpecError as error:
                raise ArtifactError(f"{where}: {error}") from error
        return manifest


class Artifact:
    """An artifact on disk, checked when opened and read layer by layer; made by :meth:`open`.

    Attributes:
        path: the folder.
        manifest: its manifest.
        digest: sha256 of manifest.json, which holds the hash of every other file.
    """

    def __init__(self, path: Path, check_hashes: bool) -> None:
        self.path = path
        data = read_manifest(path, MANIFEST, "artifact")
        self.digest = hashlib.sha256(data).hexdigest()
        self.manifest = Manifest.from_json(data, str(path / MANIFEST))
        check_files(path, self.manifest.files, check_hashes)
        self._entries = {entry.info.name: entry for entry in self.manifest.layers}
        shards = [name for name in sorted(self.manifest.files) if _is_shard(name)]
        self._tensors = _open_tensors(path, shards, _tensor_specs(self.manifest.layers))
        self._overrides = self._open_overrides()

    @classmethod
    def open(cls, path: str | Path, check_hashes: bool = True) -> Artifact:
        """Open an artifact and check everything but the numbers in its tensors, which are checked layer by layer.

        Args:
            path: the folder.
            check_hashes: hash every file; without it names, sizes, shapes and dtypes are still checked.

        Raises:
            ArtifactError: anything deviates from the format; the text names file, layer and what was expected.
        """
        return cls(Path(path), check_hashes)

    def names(self) -> list[str]:
        """Names of the quantised layers, in the model's order."""
        return list(self._entries)

    def entry(self, name: str) -> LayerEntry:
        """What the manifest says of a layer.

        Raises:
            ArtifactError: no such layer.
        """
        if name not in self._entries:
            raise ArtifactError(f"{self.path}: there is no quantised layer {name!r}")
        return self._entries[name]

    def linear(self, name: str) -> QuantizedLinear:
        """One layer's integers, as read-only views of the mapped file.

        Raises:
            ArtifactError: no such layer, a scale that is not finite, a zero point out of range, or stray bits after the
                last code of a row.
        """
        entry = self.entry(name)
        parts = {part: self._tensors[f"{name}.{part}"].read(f"{name}.{part}") for part in _layer_tensors(entry)}
        if entry.spec.scale_dtype == "exponent8":
            parts["scales"] = powers.from_bytes(parts["scales"])
        try:
            linear = QuantizedLinear(entry.spec, entry.info.in_features, **parts)
        except SpecError as error:
            raise ArtifactError(f"{self.path}: layer {name}: {error}") from error
        used = entry.info.in_features * entry.spec.bits % 8  # bits of a row's last byte that hold codes; 0: all
        if used and (linear.codes[:, -1] >> used).any():
            raise ArtifactError(f"{self.path}: layer {name}: bits after the last code of a row must be zero")
        return linear

    def overrides(self) -> dict[str, NDArray[np.float32]]:
        """Float tensors that tuning changed, by parameter name; they win over the source's."""
        file = self._overrides
        floats = {name: file.read(name) for name in file.names if file.dtype(name) == "F32"} if file else {}
        return {**floats, **{name: vector.values() for name, vector in self.vectors().items()}}

    def vectors(self) -> dict[str, Vector8]:
        """Those of :meth:`overrides` that are stored in eight bits, by parameter name."""
        file = self._overrides
        if file is None:
            return {}
        return {
            name: Vector8(file.read(name + _CODES8), float(powers.from_bytes(file.read(name + _EXPONENT8))[0]))
            for name in (tensor.removesuffix(_CODES8) for tensor in file.names if file.dtype(tensor) == "I8")
        }

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for the quantised layers, scales and zero points included, per weight; 0 without layers."""
        sizes = [(entry.info.out_features, entry.info.in_features, entry.spec) for entry in self._entries.values()]
        weights = sum(rows * width for rows, width, _ in sizes)
        return sum(spec.storage_bits(rows, width) for rows, width, spec in sizes) / weights if weights else 0.0

    def _open_overrides(self) -> TensorFile | None:
        if OVERRIDES not in self.manifest.files:
            return None
        file = TensorFile(safe_join(self.path, OVERRIDES))
        _check_overrides(file)
        return file


class ArtifactWriter:
    """Fills an existing folder with an artifact, layer by layer in any order; the manifest comes last.

    The caller owns the folder (see atomic.write_folder) and knows what is done: a run that was killed makes a
    writer anew with the names that its state records as done, and goes on.

    Args:
        folder: an existing folder; tensor files in it that hold done layers are reopened, others are begun anew.
        layers: every layer that will be added, in the model's order.
        done: layers that were added and synced before.
        shard_bytes: bytes after which a new tensor file is begun.

    Raises:
        ArtifactError: files in the folder were begun with other layers, or are missing although layers are done.
        SpecError: a spec does not fit its layer.
        WontFitError: the disk cannot hold the tensor files.
    """

    def __init__(
        self,
        folder: Path,
        layers: Sequence[tuple[LinearInfo, QuantSpec]],
        done: Iterable[str] = (),
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.folder = folder
        self._entries = {info.name: LayerEntry(info, spec) for info, spec in layers}
        if len(self._entries) != len(layers):
            raise ArtifactError("two layers have the same name")
        for info, spec in layers:
            spec.groups(info.in_features, info.name)
        self.done: set[str] = set(done)
        unknown = sorted(self.done - self._entries.keys())
        if unknown:
            raise ArtifactError(f"{folder}: the layer {unknown[0]} is done but not asked for; start again")
        self._overrides: dict[str, NDArray[np.float32] | Vector8] = {}
        self._writers = self._open_shards(_shards(self._entries, shard_bytes))

    def add(self, name: str, linear: QuantizedLinear) -> None:
        """Write one layer.

        Raises:
            ArtifactError: not a layer of this artifact, or of another shape or spec than announced.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise ArtifactError(f"{self.folder}: the layer {name!r} was not announced")
        found = (linear.spec, linear.out_features, linear.in_features)
        if found != (entry.spec, entry.info.out_features, entry.info.in_features):
            raise ArtifactError(f"{name}: announced as {entry.info} {entry.spec}, given {found}")
        for part in _layer_tensors(entry):
            values = _part(linear, part)
            self._writers[name].write(f"{name}.{part}", values)
        self.done.add(name)

    def add_override(self, name: str, values: NDArray[np.float32] | Vector8) -> None:
        """Keep a changed float tensor; held in memory until :meth:`finish`, so a resumed run adds it again."""
        self._overrides[name] = values if isinstance(values, Vector8) else np.array(values, np.float32)

    def sync(self) -> None:
        """Make the layers added so far survive a power cut; call it before recording them as done."""
        for writer in set(self._writers.values()):
            writer.sync()

    def close(self) -> None:
        """Close the tensor files without finishing; the folder can be taken up again later."""
        for writer in set(self._writers.values()):
            writer.abandon()

    def finish(
        self,
        *,
        source: Source,
        algorithm: Algorithm,
        calibration: dict[str, Any],
        kept_float: Sequence[tuple[str, str]] = (),
        versions: Mapping[str, str],
        losses: Mapping[str, tuple[float | None, float | None]] | None = None,
        side_files: Iterable[str] = (),
    ) -> Manifest:
        """Close the tensor files and write the overrides and, last, the manifest.

        Args:
            source: the float model.
            algorithm: what tuned it.
            calibration: identity of the calibration text.
            kept_float: (layer, reason) of what stayed float.
            versions: library -> version.
            losses: layer -> loss before and after.
            side_files: names of files already copied into the folder (see Checkpoint.copy_side_files).

        Returns:
            The manifest as written.

        Raises:
            ArtifactError: a layer was not added, or the manifest contradicts itself.
        """
        missing = [name for name in self._entries if name not in self.done]
        if missing:
            raise ArtifactError(f"{self.folder}: {len(missing)} layers were not added, the first is {missing[0]}")
        for writer in set(self._writers.values()):
            writer.close()
        names = {writer.path.name for writer in self._writers.values()} | set(side_files)
        if self._overrides:
            (self.folder / OVERRIDES).unlink(missing_ok=True)  # left by a run that was killed right here
            write_tensors(self.folder / OVERRIDES, _override_tensors(self._overrides), _METADATA)
            names.add(OVERRIDES)
        known = losses or {}
        manifest = Manifest(
            source=source,
            algorithm=algorithm,
            calibration=calibration,
            layers=tuple(LayerEntry(e.info, e.spec, *known.get(n, (None, None))) for n, e in self._entries.items()),
            kept_float=tuple(kept_float),
            versions=dict(versions),
            files={name: file_entry(safe_join(self.folder, name)) for name in sorted(names)},
        )
        data = encode(manifest)
        Manifest.from_json(data, str(self.folder / MANIFEST))
        sync_folder(self.folder)
        replace_file(self.folder / MANIFEST, data)
        return manifest

    def _open_shards(self, shards: Sequence[Sequence[str]]) -> dict[str, TensorFileWriter]:
        writers: dict[str, TensorFileWriter] = {}
        for number, names in enumerate(shards, 1):
            path = self.folder / f"quantized-{number:05}-of-{len(shards):05}.safetensors"
            specs = _tensor_specs([self._entries[name] for name in names])
            done = [name for name in names if name in self.done]
            written = [f"{name}.{part}" for name in done for part in _layer_tensors(self._entries[name])]
            if done:
                writer = TensorFileWriter.open_existing(path, specs, _METADATA, written)
            else:
                path.unlink(missing_ok=True)  # nothing in it is known to be complete, perhaps not even its header
                writer = TensorFileWriter(path, specs, _METADATA)
            writers.update(dict.fromkeys(names, writer))
        return writers


def artifact_source(checkpoint: Checkpoint) -> Source:
    """What an artifact says of the float model it was tuned from."""
    return {
        "location": checkpoint.location,
        "model_type": checkpoint.model_type,
        "task": checkpoint.task,
        "digest": checkpoint.digest,
        "files": checkpoint.files(),
    }


def _layer_tensors(entry: LayerEntry) -> dict[str, TensorSpec]:
    """Part -> (dtype, shape) of one layer.

    Raises:
        SpecError: group_size does not divide K.
    """
    rows, width, spec = entry.info.out_features, entry.info.in_features, entry.spec
    grid = (rows, spec.groups(width, entry.info.name))
    parts: dict[str, TensorSpec] = {
        "codes": ("U8", (rows, spec.row_bytes(width))),
        "scales": (_SCALES[spec.scale_dtype], grid),
    }
    return parts if spec.symmetric else {**parts, "zero_points": ("U8", grid)}


def _part(linear: QuantizedLinear, part: str) -> NDArray[Any]:
    """One tensor of a layer as it is stored."""
    if part == "scales" and linear.spec.scale_dtype == "exponent8":
        return powers.to_bytes(linear.scales)
    return {"codes": linear.codes, "scales": linear.scales, "zero_points": linear.full_zero_points()}[part]


def _override_tensors(overrides: Mapping[str, NDArray[np.float32] | Vector8]) -> dict[str, tuple[str, NDArray[Any]]]:
    tensors: dict[str, tuple[str, NDArray[Any]]] = {}
    for name, values in overrides.items():
        if isinstance(values, Vector8):
            tensors[name + _CODES8] = ("I8", values.codes)
            tensors[name + _EXPONENT8] = ("U8", powers.to_bytes(np.array([values.scale], np.float32)))
        else:
            tensors[name] = ("F32", values)
    return tensors


def _check_overrides(file: TensorFile) -> None:
    """Hold the names, dtypes and shapes of the overrides against the format."""
    for name in file.names:
        dtype = file.dtype(name)
        if dtype == "I8" and name.endswith(_CODES8):
            owner = name.removesuffix(_CODES8)
            partner, wanted = owner + _EXPONENT8, ("U8", (1,))
            if partner not in file or (file.dtype(partner), file.shape(partner)) != wanted:
                raise ArtifactError(f"{file.path}: {name} needs {partner}, U8 [1]")
            if owner in file:
                raise ArtifactError(f"{file.path}: {owner} is there in two forms")
        elif dtype == "U8" and name.endswith(_EXPONENT8):
            owner = name.removesuffix(_EXPONENT8)
            if owner + _CODES8 not in file:
                raise ArtifactError(f"{file.path}: {name} belongs to no {owner + _CODES8}")
        elif dtype != "F32":
            raise ArtifactError(f"{file.path}: {name} is {dtype}; overrides are F32, or I8 with an exponent")


def _tensor_specs(entries: Iterable[LayerEntry]) -> dict[str, TensorSpec]:
    """Tensor -> (dtype, shape) of several layers."""
    return {f"{entry.info.name}.{part}": spec for entry in entries for part, spec in _layer_tensors(entry).items()}


def _shards(entries: Mapping[str, LayerEntry], limit: int) -> list[list[str]]:
    """Layers per tensor file: in order, a new file where the limit would be passed."""
    shards: list[list[str]] = []
    room = 0
    for name, entry in entries.items():
        size = entry.spec.storage_bits(entry.info.out_features, entry.info.in_features) // 8
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _is_shard(name: str) -> bool:
    return name.startswith("quantized-") and name.endswith(".safetensors")


def _open_tensors(folder: Path, shards: Sequence[str], expected: Mapping[str, TensorSpec]) -> dict[str, TensorFile]:
    """Tensor -> file, after holding names, dtypes and shapes against what the manifest's layers need."""
    found: dict[str, TensorFile] = {}
    for shard in shards:
        file = TensorFile(safe_join(folder, shard))
        for name in file.names:
            if name not in expected:
                raise ArtifactError(f"{file.path}: the tensor {name} belongs to no layer of the manifest")
            if name in found:
                raise ArtifactError(f"{file.path}: the tensor {name} is in {found[name].path.name} too")
            if (file.dtype(name), file.shape(name)) != expected[name]:
                dtype, shape = expected[name]
                raise ArtifactError(
                    f"{file.path}: {name} is {file.dtype(name)} {list(file.shape(name))}, "
                    f"the manifest's layer needs {dtype} {list(shape)}"
                )
            found[name] = file
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise ArtifactError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    return found
