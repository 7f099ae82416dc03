"""An artifact's layers with the float values that they had, and the floats that tuning changed beside them.

Values come from the float model that the artifact names; one tensor is in memory at a time.  A weight that its file
stores [K, N] (transformers' Conv1D) is turned; for a square one the integers decide which way it stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import UnsupportedError
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import LayerKind, LinearInfo, QuantSpec

if TYPE_CHECKING:
    from roundexport.formats.artifact import Artifact
    from roundexport.model.checkpoint import Checkpoint


@dataclass(frozen=True, eq=False)
class Layer:
    """One tuned layer.

    Args:
        info: its name and shape.
        spec: its scheme.
        roles: how its weight is read: as a linear's, as an embedding's, or, tied, as both.
    """

    info: LinearInfo
    spec: QuantSpec
    roles: frozenset[LayerKind]

    @property
    def name(self) -> str:
        """Name in the artifact."""
        return self.info.name


class TunedLayers:
    """The layers of an artifact.

    Args:
        artifact: the integers.
        checkpoint: the float model they came from.
    """

    def __init__(self, artifact: Artifact, checkpoint: Checkpoint) -> None:
        self.artifact, self._checkpoint = artifact, checkpoint
        self.all = [_layer(artifact, name) for name in artifact.names()]

    def weight(self, layer: Layer) -> NDArray[np.float32]:
        """The float weight [N, K] that a layer was tuned from.

        Raises:
            UnsupportedError: the float model holds it in another shape.
        """
        info = layer.info
        stored = self._checkpoint.float32(f"{info.name}.weight")
        shape = (info.out_features, info.in_features)
        if stored.shape == shape and stored.shape == shape[::-1]:
            tuned = self.artifact.linear(info.name).dequantize()
            if np.square(stored.T - tuned).sum() < np.square(stored - tuned).sum():
                return np.ascontiguousarray(stored.T)
            return stored
        if stored.shape == shape:
            return stored
        if stored.shape == shape[::-1]:
            return np.ascontiguousarray(stored.T)
        raise UnsupportedError(f"{info.name}: the float model holds {stored.shape}, the artifact {shape}")

    def integers(self, layer: Layer) -> QuantizedLinear:
        """The layer's integers."""
        return self.artifact.linear(layer.name)

    def overrides(self) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.float32]]]:
        """(parameter, its values before, its values after) of the floats that tuning changed."""
        for name, after in self.artifact.overrides().items():
            before = self._checkpoint.float32(name)
            if not np.array_equal(before, after.reshape(before.shape)):
                yield name, before, after.reshape(before.shape)


def _layer(artifact: Artifact, name: str) -> Layer:
    entry = artifact.entry(name)
    roles: set[LayerKind] = {entry.info.kind, *(("linear",) if entry.info.shared_with else ())}
    return Layer(entry.info, entry.spec, frozenset(roles))
