"""Integers decoded from products and tables of integers (integer_linears.py): codes as INT4 or bytes, a byte per scale.

The node's metadata names the two initializers; type, shape and bytes are the file's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import onnx

from roundexport.errors import ArtifactError, SpecError
from roundexport.formats.package import LAYERS_KEY
from roundexport.quant import power_of_two
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec

from .node_reader import NodeReader

_SIGN_BITS = {onnx.TensorProto.INT4: 0x88, onnx.TensorProto.UINT8: 0}


def integer_layers_of(
    reader: NodeReader, specs: Mapping[str, QuantSpec], stored: str
) -> tuple[str, Iterator[tuple[str, QuantizedLinear]]]:
    """Name of the codes' initializer, and the layers in it.

    Args:
        reader: of the node.
        specs: artifact layer -> scheme.
        stored: what the node's metadata says under INTEGERS_KEY.

    Raises:
        ArtifactError: the bytes make no sense, or a layer is not expected.
    """
    codes, scales = json.loads(stored)
    return codes, _layers(reader, specs, codes, scales)


def _layers(
    reader: NodeReader, specs: Mapping[str, QuantSpec], codes: str, scales: str
) -> Iterator[tuple[str, QuantizedLinear]]:
    node = reader.node
    recorded = {entry.key: entry.value for entry in node.metadata_props}.get(LAYERS_KEY)
    kind = reader.tensor(codes).data_type
    if recorded is None or kind not in _SIGN_BITS:
        raise ArtifactError(f"{reader.folder}: {node.name} does not say which layers it holds, or not in four bits")
    shape = list(reader.tensor(scales).dims)
    powers = power_of_two.from_bytes(reader.raw(scales).reshape(shape))
    packed = reader.raw(codes).reshape(shape[0], -1) ^ np.uint8(_SIGN_BITS[kind])
    start = 0
    for name, rows, in_features, scale_dtype in json.loads(recorded):
        if name not in specs:
            raise ArtifactError(f"{reader.folder}: {node.name} holds {name!r}, which is not expected")
        spec, part = replace(specs[name], scale_dtype=scale_dtype), slice(start, start + rows)
        try:
            yield name, QuantizedLinear(spec, in_features, packed[part], powers[part])
        except SpecError as error:
            raise ArtifactError(f"{reader.folder}: {name}: {error}") from error
        start += rows
    if start != len(packed):
        raise ArtifactError(f"{reader.folder}: {node.name} has {len(packed)} rows, its layers {start}")
