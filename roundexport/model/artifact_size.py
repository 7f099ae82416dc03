"""What an artifact's weights take, byte by byte, against the float model; nothing needed to compute is left out.

    codes, scales, zero points    of the quantized layers, as they are stored
    vectors                       norms and biases in eight bits, with their exponents
    floats                        float tensors: the artifact's overrides and what the source has left, 4 bytes a number
    container                     headers of the tensor files and manifest.json: names, shapes, schemes

`float32` is 4 bytes for every weight.  Weights shared by two modules count once, on both sides.  A pooler counts on
neither: no output that is used here depends on it, and no package holds it; nor do buffers of integers.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roundexport.errors import RoundexportError
from roundexport.formats.artifact import Artifact
from roundexport.formats.artifact_manifest import MANIFEST

from .parts import part_of

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

_FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Sizes:
    """Bytes by part; see the module.

    Args:
        float32: what all weights of the model take as float32; None where the model is not at hand.
        floats: None likewise.
    """

    codes: int
    scales: int
    zero_points: int
    vectors: int
    container: int
    floats: int | None = None
    float32: int | None = None

    @property
    def total(self) -> int | None:
        """All parts together; None where floats are not known."""
        if self.floats is None:
            return None
        return self.codes + self.scales + self.zero_points + self.vectors + self.floats + self.container

    @property
    def ratio(self) -> float | None:
        """How many times smaller than float32 the total is."""
        return None if self.total is None or self.float32 is None else self.float32 / self.total

    def to_json(self) -> dict[str, Any]:
        """The parts, total and ratio as a JSON object."""
        return {**asdict(self), "total": self.total, "ratio": self.ratio}


def sizes(artifact: Artifact, checkpoint: Checkpoint | None = None) -> Sizes:
    """Bytes of an artifact's weights.

    Args:
        artifact: the artifact.
        checkpoint: the float model it was made from; only its shapes are looked at.  None leaves out what needs it.
    """
    entries = [artifact.entry(name) for name in artifact.names()]
    shapes = [(entry.spec, entry.info.out_features, entry.info.in_features) for entry in entries]
    groups = [(spec, rows * spec.groups(width)) for spec, rows, width in shapes]
    vectors = artifact.vectors()
    files = [entry["size"] for name, entry in artifact.manifest.files.items() if name.endswith(".safetensors")]
    found = Sizes(
        codes=sum(rows * spec.row_bytes(width) for spec, rows, width in shapes),
        scales=sum(count * spec.scale_bits // 8 for spec, count in groups),
        zero_points=sum(count for spec, count in groups if not spec.symmetric),
        vectors=sum(vector.codes.size + 1 for vector in vectors.values()),
        container=(artifact.path / MANIFEST).stat().st_size,
    )
    overrides = artifact.overrides()
    own = 4 * sum(values.size for name, values in overrides.items() if name not in vectors)
    data = found.codes + found.scales + found.zero_points + found.vectors + own
    found = replace(found, container=found.container + sum(files) - data)
    if checkpoint is None:
        return found
    weights = {
        name: math.prod(shape)
        for name, shape in checkpoint.owned().items()
        if not checkpoint.may_lack(name) and checkpoint.dtype(name) in _FLOATS
    }
    held = {f"{module}.weight" for e in entries for module in (e.info.name, *e.info.shared_with)} | overrides.keys()
    rest = 4 * sum(count for name, count in weights.items() if name not in held)
    return replace(found, floats=own + rest, float32=4 * sum(weights.values()))


def sizes_at_hand(artifact: Artifact) -> Sizes:
    """:func:`sizes`, with the float model where the artifact says it was, if it still is."""
    from .checkpoint import Checkpoint

    location = artifact.manifest.source["location"]
    try:
        part = part_of(artifact.manifest.source["task"])
        return sizes(artifact, Checkpoint.open(location, part=part) if Path(location).exists() else None)
    except RoundexportError:  # gone, damaged, or another thing is there now: an artifact is described without it
        return sizes(artifact)
