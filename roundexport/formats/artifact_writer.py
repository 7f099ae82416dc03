"""`ArtifactWriter`: fills a folder with an artifact (artifact.py), layer by layer, the manifest last.

    shards         the layers in the model's order, a new tensor file where one would pass its limit; every file is made
                   at once in its full size, so that a layer can be written into its place whenever it is done
    add, sync      a layer's integers go to the disk when it is added; after sync they survive a power cut
    finish         overrides, then the manifest, by atomic replacement: before that the folder is no artifact

Equal inputs, equal bytes: nothing here knows the time, the machine's name or the order in which layers were finished.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import ArtifactError
from roundexport.quant import power_of_two
from roundexport.quant.int8_tensor import Int8Tensor
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import LinearInfo, QuantSpec
from roundexport.storage.atomic import replace_file, sync_folder
from roundexport.storage.checksums import file_entry
from roundexport.storage.paths import safe_join
from roundexport.storage.safetensors_writer import TensorFileWriter, write_tensors
from roundexport.storage.sharded_writer import split
from roundexport.storage.strict_json import encode

from .artifact_manifest import (
    CODES8,
    EXPONENT8,
    FORMAT,
    MANIFEST,
    OVERRIDES,
    Algorithm,
    LayerEntry,
    Manifest,
    Source,
    tensor_specs,
)

SHARD_BYTES = 2 << 30
_METADATA = {"format": FORMAT}


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
        self._overrides: dict[str, NDArray[np.float32] | Int8Tensor] = {}
        sizes = {name: entry.stored_bytes() for name, entry in self._entries.items()}
        self._writers = self._open_shards(split(sizes, shard_bytes))

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
        for part in entry.parts():
            values = _part(linear, part)
            self._writers[name].write(f"{name}.{part}", values)
        self.done.add(name)

    def add_override(self, name: str, values: NDArray[np.float32] | Int8Tensor) -> None:
        """Keep a changed float tensor; held in memory until :meth:`finish`, so a resumed run adds it again."""
        self._overrides[name] = values if isinstance(values, Int8Tensor) else np.array(values, np.float32)

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
            specs = tensor_specs([self._entries[name] for name in names])
            done = [name for name in names if name in self.done]
            written = [f"{name}.{part}" for name in done for part in self._entries[name].parts()]
            if done:
                writer = TensorFileWriter.open_existing(path, specs, _METADATA, written)
            else:
                path.unlink(missing_ok=True)  # nothing in it is known to be complete, perhaps not even its header
                writer = TensorFileWriter(path, specs, _METADATA)
            writers.update(dict.fromkeys(names, writer))
        return writers


def _part(linear: QuantizedLinear, part: str) -> NDArray[Any]:
    """One tensor of a layer as it is stored."""
    if part == "scales" and linear.spec.scale_dtype == "exponent8":
        return power_of_two.to_bytes(linear.scales)
    return {"codes": linear.codes, "scales": linear.scales, "zero_points": linear.full_zero_points()}[part]


def _override_tensors(overrides: Mapping[str, NDArray[np.float32] | Int8Tensor]) -> dict[str, tuple[str, NDArray[Any]]]:
    tensors: dict[str, tuple[str, NDArray[Any]]] = {}
    for name, values in overrides.items():
        if isinstance(values, Int8Tensor):
            tensors[name + CODES8] = ("I8", values.codes)
            tensors[name + EXPONENT8] = ("U8", power_of_two.to_bytes(np.array([values.scale], np.float32)))
        else:
            tensors[name] = ("F32", values)
    return tensors
