"""Where a target finds the numbers behind a placeholder: integers in the artifact, everything else in the source."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from roundexport.model.integer_inputs import recorded
from roundexport.quant.quantized_linear import QuantizedLinear

if TYPE_CHECKING:
    from roundexport.formats.artifact import Artifact
    from roundexport.kernels._block_format import Format
    from roundexport.model.checkpoint import Checkpoint
    from roundexport.quant.int8_tensor import Int8Tensor
    from roundexport.quant.spec import QuantSpec


class WeightSource:
    """Weights and biases of one model by module name, one at a time.

    Args:
        artifact: the tuned layers and overridden float tensors.
        checkpoint: the float model they came from.
        transposed: names of modules whose float weight is stored [K, N], see Capture.
    """

    _inputs: Mapping[str, Format] = MappingProxyType({})  # of sources that stand in for one, none

    def __init__(self, artifact: Artifact, checkpoint: Checkpoint, transposed: frozenset[str]) -> None:
        self._artifact = artifact
        self._transposed = transposed
        self._checkpoint = checkpoint
        self._overrides = artifact.overrides()
        self._inputs = recorded(artifact)
        self._owner = {name: name for name in artifact.names()}
        for name in artifact.names():
            self._owner.update(dict.fromkeys(artifact.entry(name).info.shared_with, name))

    def owner(self, module: str) -> str | None:
        """The artifact layer that holds this module's weight (its own, or the one it is tied to); None: kept float."""
        return self._owner.get(module)

    @property
    def integer_inputs(self) -> bool:
        """Whether the artifact settles how linears' inputs become integers."""
        return bool(self._inputs)

    def entering(self, owner: str) -> Format | None:
        """The format of a layer's inputs in eight bits, where the artifact settles it."""
        return self._inputs.get(owner)

    def vectors(self) -> dict[str, Int8Tensor]:
        """Norms and biases that the artifact has in eight bits, by parameter name."""
        return self._artifact.vectors()

    def quantized(self, module: str) -> QuantizedLinear:
        """Integers of a module that :meth:`owner` knows."""
        return self._artifact.linear(self._owner[module])

    def spec(self, module: str) -> QuantSpec:
        """The scheme of a module that :meth:`owner` knows."""
        return self._artifact.entry(self._owner[module]).spec

    def float_weight(self, module: str) -> NDArray[np.float32]:
        """Float weight [N, K] of a module kept float; Conv1D weights, stored [K, N], are turned."""
        weight = self._float(f"{module}.weight")
        return np.ascontiguousarray(weight.T) if module in self._transposed else weight

    def bias(self, module: str) -> NDArray[np.float32]:
        """Bias [N] of a module that has one."""
        return self._float(f"{module}.bias")

    def _float(self, name: str) -> NDArray[np.float32]:
        return self._overrides[name] if name in self._overrides else self._checkpoint.float32(name)


class NoWeights(WeightSource):
    """Stands in where a graph is lowered only to see whether it can be: every module is float, no value is there."""

    def __init__(self) -> None:
        pass

    def owner(self, module: str) -> str | None:
        """Always None."""
        return None

    def bias(self, module: str) -> NDArray[np.float32]:
        """One zero, which adds to any width."""
        return np.zeros(1, np.float32)
