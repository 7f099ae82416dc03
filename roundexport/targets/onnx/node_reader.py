"""What a node of a written graph reads from initializers: bytes mapped from the data file, or inside the model file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from roundexport.errors import ArtifactError
from roundexport.storage.paths import safe_join

_TYPE = onnx.TensorProto
_DTYPES = {_TYPE.UINT8: np.uint8, _TYPE.FLOAT: np.float32, _TYPE.FLOAT16: np.float16, _TYPE.INT64: np.int64}
_BITS = {
    _TYPE.INT4: 4, _TYPE.UINT4: 4, _TYPE.INT8: 8, _TYPE.UINT8: 8, _TYPE.FLOAT16: 16, _TYPE.FLOAT: 32, _TYPE.INT64: 64,
}  # fmt: skip


@dataclass(frozen=True)
class NodeReader:
    """One node's inputs by position, resolved to initializers.

    Args:
        folder: of the model file.
        initializers: by name.
        aliases: output of a Reshape -> what it reshapes.
        node: the node.
    """

    folder: Path
    initializers: Mapping[str, onnx.TensorProto]
    aliases: Mapping[str, str]
    node: onnx.NodeProto

    def array(self, position: int) -> NDArray[Any] | None:
        """Numbers of an input; a reshaped initializer is read as it was before."""
        name = self.node.input[position] if position < len(self.node.input) else ""
        if not name:
            return None
        tensor = self.tensor(self.aliases.get(name, name))
        dtype = _DTYPES.get(tensor.data_type)
        if dtype is None:
            raise ArtifactError(f"{self.folder}: {tensor.name} has an unexpected type")
        return self.raw(tensor.name).view(dtype).reshape(tensor.dims)

    def tensor(self, name: str) -> onnx.TensorProto:
        """The initializer of this name.

        Raises:
            ArtifactError: there is none.
        """
        tensor = self.initializers.get(name)
        if tensor is None:
            raise ArtifactError(f"{self.folder}: {name!r}, which {self.node.name} reads, is not a stored weight")
        return tensor

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of an initializer.

        Raises:
            ArtifactError: it has another type than weights have, or does not lie where the model says.
        """
        tensor = self.tensor(name)
        if tensor.data_type not in _BITS:
            raise ArtifactError(f"{self.folder}: {tensor.name} has an unexpected type")
        size = (math.prod(tensor.dims) * _BITS[tensor.data_type] + 7) // 8
        if tensor.data_location != _TYPE.EXTERNAL:
            if len(tensor.raw_data) != size:
                raise ArtifactError(f"{self.folder}: {tensor.name} has {len(tensor.raw_data)} bytes, not {size}")
            return np.frombuffer(tensor.raw_data, np.uint8)
        place = {entry.key: entry.value for entry in tensor.external_data}
        path = safe_join(self.folder, place["location"])
        if int(place["length"]) != size or int(place["offset"]) + size > path.stat().st_size:
            raise ArtifactError(f"{path}: {tensor.name} does not lie where the model says")
        return np.memmap(path, np.uint8, "r", int(place["offset"]), (size,))

    def attribute(self, name: str) -> int:
        """An integer attribute that must be there."""
        for attribute in self.node.attribute:
            if attribute.name == name:
                return int(attribute.i)
        raise ArtifactError(f"{self.folder}: {self.node.name} has no attribute {name}")
