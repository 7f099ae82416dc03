"""The manifest of an artifact, `manifest.json`: what was tuned from what and how, and the hash of every other file.

The reader (artifact.py) and the writer (artifact_writer.py) meet here: which layers there are, and by which names,
dtypes and shapes their tensors are stored, follows from the manifest alone.  Specified in FORMAT.md; JSON is read
strictly (strict_json.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict

from roundexport.errors import ArtifactError, SpecError
from roundexport.quant.spec import LinearInfo, QuantSpec
from roundexport.storage.checksums import FileEntry
from roundexport.storage.safetensors_reader import DTYPES, TensorSpec
from roundexport.storage.strict_json import decode, parse_format
from roundexport.types import Task

MANIFEST = "manifest.json"
FORMAT = "roundexport/1"
OVERRIDES = "overrides.safetensors"
CODES8, EXPONENT8 = ".int8", ".exponent"  # what an override in eight bits adds to its parameter's name
_SCALES = {"float16": "F16", "float32": "F32", "exponent8": "U8"}


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
    """One quantized weight and what tuning did to it; losses are the algorithm's own measure, or None."""

    info: LinearInfo
    spec: QuantSpec
    loss_before: float | None = None
    loss_after: float | None = None

    def parts(self) -> dict[str, TensorSpec]:
        """Part -> (dtype, shape) of what is stored of it; a part's tensor is named ``<layer>.<part>``.

        Raises:
            SpecError: group_size does not divide K.
        """
        rows, width, spec = self.info.out_features, self.info.in_features, self.spec
        grid = (rows, spec.groups(width, self.info.name))
        parts: dict[str, TensorSpec] = {
            "codes": ("U8", (rows, spec.row_bytes(width))),
            "scales": (_SCALES[spec.scale_dtype], grid),
        }
        return parts if spec.symmetric else {**parts, "zero_points": ("U8", grid)}

    def stored_bytes(self) -> int:
        """Bytes that an artifact spends on it: those of :meth:`QuantSpec.storage_bits`, but a byte per zero point."""
        return sum(DTYPES[dtype].itemsize * math.prod(shape) for dtype, shape in self.parts().values())


@dataclass(frozen=True)
class Manifest:
    """Everything in `manifest.json`.

    Args:
        source: the float model.
        algorithm: what tuned it.
        calibration: identity of the text it was tuned on.
        layers: the quantized weights, in the model's order.
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
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
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


def tensor_specs(entries: Iterable[LayerEntry]) -> dict[str, TensorSpec]:
    """Tensor -> (dtype, shape) of several layers."""
    return {f"{entry.info.name}.{part}": spec for entry in entries for part, spec in entry.parts().items()}
