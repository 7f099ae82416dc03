"""The proof: integers decoded from the written files, without help from what wrote them.

model.onnx is parsed as a protobuf, the bytes of every initializer are mapped from the data file, and each MatMulNBits,
GroupMatMul and GatherBlockQuantized node (DequantizeLinear and Gather: standard/readback.py, products and tables of
integers: integer_readback.py) gives its layers back: which rows are which layer stands in the node's metadata, how the
artifact had the layer (bits, group, symmetric) in the package manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import onnx

from roundexport.errors import ArtifactError
from roundexport.formats.package import LAYERS_KEY
from roundexport.kernels.native.library import DOMAIN, OPERATOR
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec

from .graph import MICROSOFT
from .integer_linears import INTEGERS_KEY
from .integer_readback import integer_layers_of
from .node_reader import NodeReader
from .standard.readback import layers_of as standard_layers_of
from .weight_layout import StoredWeight, decode


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
        own = node.domain in (MICROSOFT, DOMAIN) and node.op_type in _CODES
        if not own and not node.metadata_props:
            continue
        reader = NodeReader(model_path.parent, initializers, aliases, node)
        codes_name = node.input[_CODES[node.op_type] if own else 0] if node.input else ""
        if integers := {entry.key: entry.value for entry in node.metadata_props}.get(INTEGERS_KEY):
            codes_name, found = integer_layers_of(reader, specs, integers)
        else:
            found = _layers_of(reader, specs) if own else standard_layers_of(reader, specs)
        for name, linear in found:
            if source.setdefault(name, aliases.get(codes_name, codes_name)) != aliases.get(codes_name, codes_name):
                raise ArtifactError(f"{model_path}: the layer {name} is stored twice")
            yield name, linear


_CODES = {"MatMulNBits": 1, OPERATOR: 1, "GatherBlockQuantized": 0}
_SCALES, _ZERO_POINTS = 2, 3


def _layers_of(reader: NodeReader, specs: Mapping[str, QuantSpec]) -> Iterator[tuple[str, QuantizedLinear]]:
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
