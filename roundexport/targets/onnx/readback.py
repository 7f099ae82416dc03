"""The proof: integers decoded from the written files, without help from what wrote them.

model.onnx is parsed as a protobuf, the bytes of every initializer are mapped from the data file, and each MatMulNBits
and GatherBlockQuantized node gives its layers back: which rows are which layer stands in the node's metadata, how the
artifact had the layer (bits, group, symmetric) in the package manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from roundexport.errors import ArtifactError
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec
from roundexport.storage.paths import safe_join

from .graph import MICROSOFT
from .linears import LAYERS_KEY
from .weight_layout import StoredWeight, decode

_DTYPES = {onnx.TensorProto.UINT8: np.uint8, onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.INT64: np.int64}


@dataclass(frozen=True)
class _Reader:
    """One node's inputs by position, resolved to initializers."""

    folder: Path
    initializers: Mapping[str, onnx.TensorProto]
    aliases: Mapping[str, str]
    node: onnx.NodeProto

    def array(self, position: int) -> NDArray[Any] | None:
        """Numbers of an input; a reshaped initializer is read as it was before."""
        name = self.node.input[position] if position < len(self.node.input) else ""
        if not name:
            return None
        tensor = self.initializers.get(self.aliases.get(name, name))
        if tensor is None:
            raise ArtifactError(f"{self.folder}: input {position} of {self.node.name} is not a stored weight")
        return _numbers(self.folder, tensor)

    def attribute(self, name: str) -> int:
        """An integer attribute that must be there."""
        for attribute in self.node.attribute:
            if attribute.name == name:
                return int(attribute.i)
        raise ArtifactError(f"{self.folder}: {self.node.name} has no attribute {name}")


def decode_layers(model_path: Path, specs: Mapping[str, QuantSpec]) -> Iterator[tuple[str, QuantizedLinear]]:
    """The quantized layers of a written graph, one at a time: views of mapped files where the form allows.

    A tied weight comes once for each of its readers.

    Args:
        model_path: model.onnx; its data file lies beside it.
        specs: artifact layer -> scheme; its scale dtype is taken from the graph.

    Yields:
        Layer name and its integers.

    Raises:
        ArtifactError: a layer that is not expected, is stored twice, or whose bytes make no sense.
    """
    graph = onnx.load(model_path, load_external_data=False).graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    aliases = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Reshape"}
    source: dict[str, str] = {}
    for node in graph.node:
        if node.domain != MICROSOFT or node.op_type not in _CODES:
            continue
        reader = _Reader(model_path.parent, initializers, aliases, node)
        codes_name = node.input[_CODES[node.op_type]]
        for name, linear in _layers_of(reader, specs):
            if source.setdefault(name, aliases.get(codes_name, codes_name)) != aliases.get(codes_name, codes_name):
                raise ArtifactError(f"{model_path}: the layer {name} is stored twice")
            yield name, linear


_CODES = {"MatMulNBits": 1, "GatherBlockQuantized": 0}
_SCALES, _ZERO_POINTS = 2, 3


def _layers_of(reader: _Reader, specs: Mapping[str, QuantSpec]) -> Iterator[tuple[str, QuantizedLinear]]:
    node = reader.node
    recorded = {entry.key: entry.value for entry in node.metadata_props}.get(LAYERS_KEY)
    if recorded is None:
        raise ArtifactError(f"{reader.folder}: {node.name} does not say which layers it holds")
    codes, scales = reader.array(_CODES[node.op_type]), reader.array(_SCALES)
    if codes is None or scales is None:
        raise ArtifactError(f"{reader.folder}: {node.name} lacks codes or scales")
    bits, block = reader.attribute("bits"), reader.attribute("block_size")
    stored = StoredWeight(codes.reshape(*scales.shape, block * bits // 8), scales, reader.array(_ZERO_POINTS))
    start = 0
    for name, rows, in_features, scale_dtype in json.loads(recorded):
        if name not in specs:
            raise ArtifactError(f"{reader.folder}: {node.name} holds {name!r}, which is not expected")
        spec = replace(specs[name], scale_dtype=scale_dtype)
        yield name, decode(stored.rows(start, start + rows), bits, spec, in_features, name)
        start += rows
    if start != len(codes):
        raise ArtifactError(f"{reader.folder}: {node.name} has {len(codes)} rows, its layers {start}")


def _numbers(folder: Path, tensor: onnx.TensorProto) -> NDArray[Any]:
    dtype = _DTYPES.get(tensor.data_type)
    if dtype is None:
        raise ArtifactError(f"{folder}: {tensor.name} has an unexpected type")
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return np.frombuffer(tensor.raw_data, dtype).reshape(tensor.dims)
    place = {entry.key: entry.value for entry in tensor.external_data}
    path = safe_join(folder, place["location"])
    size = int(np.prod(tensor.dims)) * np.dtype(dtype).itemsize
    if int(place["length"]) != size or int(place["offset"]) + size > path.stat().st_size:
        raise ArtifactError(f"{path}: {tensor.name} does not lie where the model says")
    return np.memmap(path, dtype, "r", int(place["offset"]), tuple(tensor.dims))
