"""The artifact: what tuning hands to export, a folder with integers, scales and a manifest.

    manifest.json                            written last: without it the folder is unfinished
    quantized-00001-of-0000n.safetensors     <layer>.codes        U8       [N, ceil(K·bits/8)]
                                             <layer>.scales       F16|F32|U8  [N, G]
                                             <layer>.zero_points  U8       [N, G], absent exactly when symmetric
    overrides.safetensors                    optional: tensors that tuning changed, by parameter name: F32, or in eight
                                             bits (int8_tensor.py)
    config.json, tokenizer.json, …           copied from the source byte for byte

Float weights that tuning left alone stay in the source, which the manifest names by hash.  Specified in FORMAT.md; this
is the reader, which refuses everything that deviates (tests/formats/test_artifact_hostile.py).  artifact_writer.py
writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import ArtifactError, SpecError
from roundexport.quant import power_of_two
from roundexport.quant.int8_tensor import Int8Tensor
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.storage.checksums import check_files, read_manifest
from roundexport.storage.paths import safe_join
from roundexport.storage.safetensors_reader import TensorFile, TensorSpec

from .artifact_manifest import CODES8, EXPONENT8, MANIFEST, OVERRIDES, LayerEntry, Manifest, tensor_specs


class Artifact:
    """An artifact on disk, checked when opened and read layer by layer; made by :meth:`open`.

    Attributes:
        path: the folder.
        manifest: its manifest.
        digest: sha256 of manifest.json, which holds the hash of every other file.
    """

    def __init__(self, path: Path, check_hashes: bool) -> None:
        self.path = path
        data = read_manifest(path, MANIFEST, "an artifact")
        self.digest = hashlib.sha256(data).hexdigest()
        self.manifest = Manifest.from_json(data, str(path / MANIFEST))
        check_files(path, self.manifest.files, check_hashes)
        self._entries = {entry.info.name: entry for entry in self.manifest.layers}
        shards = [name for name in sorted(self.manifest.files) if _is_shard(name)]
        self._tensors = _open_tensors(path, shards, tensor_specs(self.manifest.layers))
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
        """Names of the quantized layers, in the model's order."""
        return list(self._entries)

    def entry(self, name: str) -> LayerEntry:
        """What the manifest says of a layer.

        Raises:
            ArtifactError: no such layer.
        """
        if name not in self._entries:
            raise ArtifactError(f"{self.path}: there is no quantized layer {name!r}")
        return self._entries[name]

    def linear(self, name: str) -> QuantizedLinear:
        """One layer's integers, as read-only views of the mapped file.

        Raises:
            ArtifactError: no such layer, a scale that is not finite, a zero point out of range, or stray bits after the
                last code of a row.
        """
        entry = self.entry(name)
        parts = {part: self._tensors[f"{name}.{part}"].read(f"{name}.{part}") for part in entry.parts()}
        if entry.spec.scale_dtype == "exponent8":
            parts["scales"] = power_of_two.from_bytes(parts["scales"])
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

    def vectors(self) -> dict[str, Int8Tensor]:
        """Those of :meth:`overrides` that are stored in eight bits, by parameter name."""
        file = self._overrides
        if file is None:
            return {}
        return {
            name: Int8Tensor(file.read(name + CODES8), float(power_of_two.from_bytes(file.read(name + EXPONENT8))[0]))
            for name in (tensor.removesuffix(CODES8) for tensor in file.names if file.dtype(tensor) == "I8")
        }

    @property
    def bits_per_weight(self) -> float:
        """Bits of the quantized layers per weight, as `QuantSpec.storage_bits` counts them; 0 without layers."""
        sizes = [(entry.info.out_features, entry.info.in_features, entry.spec) for entry in self._entries.values()]
        weights = sum(rows * width for rows, width, _ in sizes)
        return sum(spec.storage_bits(rows, width) for rows, width, spec in sizes) / weights if weights else 0.0

    def _open_overrides(self) -> TensorFile | None:
        if OVERRIDES not in self.manifest.files:
            return None
        file = TensorFile(safe_join(self.path, OVERRIDES))
        _check_overrides(file)
        return file


def _check_overrides(file: TensorFile) -> None:
    """Hold the names, dtypes and shapes of the overrides against the format."""
    for name in file.names:
        dtype = file.dtype(name)
        if dtype == "I8" and name.endswith(CODES8):
            owner = name.removesuffix(CODES8)
            partner, wanted = owner + EXPONENT8, ("U8", (1,))
            if partner not in file or (file.dtype(partner), file.shape(partner)) != wanted:
                raise ArtifactError(f"{file.path}: {name} needs {partner}, U8 [1]")
            if owner in file:
                raise ArtifactError(f"{file.path}: {owner} is there in two forms")
        elif dtype == "U8" and name.endswith(EXPONENT8):
            owner = name.removesuffix(EXPONENT8)
            if owner + CODES8 not in file:
                raise ArtifactError(f"{file.path}: {name} belongs to no {owner + CODES8}")
        elif dtype != "F32":
            raise ArtifactError(f"{file.path}: {name} is {dtype}; overrides are F32, or I8 with an exponent")


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
