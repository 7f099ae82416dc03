"""Integers decoded from a written graph of the standard dialect, without help from what wrote them.

A layer is a DequantizeLinear or a Gather whose metadata names it.  Codes, their type, scales and zero points are the
initializers that the node reads; an embedding's node says which initializers the others are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import cast

import numpy as np
import onnx

from roundexport.errors import ArtifactError
from roundexport.formats.package import LAYERS_KEY
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec
from roundexport.targets.onnx.node_reader import NodeReader

from .linears import PARTS_KEY
from .weight_layout import TYPES, Kind, StandardForm, StandardWeight, decode


def layers_of(reader: NodeReader, specs: Mapping[str, QuantSpec]) -> Iterator[tuple[str, QuantizedLinear]]:
    """The layers that a node of the standard dialect holds, none where it says nothing of any.

    Raises:
        ArtifactError: the bytes make no sense, or the layer is not expected.
    """
    said = {entry.key: entry.value for entry in reader.node.metadata_props}
    if LAYERS_KEY not in said or reader.node.op_type not in ("DequantizeLinear", "Gather"):
        return
    looked_up = reader.node.op_type == "Gather"
    names = list(reader.node.input)
    scales_name, points_name = names[1], names[2] if len(names) > 2 else None
    if looked_up:
        parts = json.loads(said.get(PARTS_KEY, "{}"))
        scales_name, points_name = str(parts.get("scales")), parts.get("zero_points")
    kind = onnx.TensorProto.DataType.Name(reader.tensor(names[0]).data_type)
    if kind not in TYPES:
        raise ArtifactError(f"{reader.folder}: {reader.node.name} holds codes of type {kind}")
    ((name, rows, width, scale_dtype),) = json.loads(said[LAYERS_KEY])
    if name not in specs:
        raise ArtifactError(f"{reader.folder}: {reader.node.name} holds {name!r}, which is not expected")
    spec = replace(specs[name], scale_dtype=scale_dtype)
    grid = list(reader.tensor(scales_name).dims)
    form = StandardForm(cast(Kind, kind), width // grid[0] if len(grid) > 1 else None)
    if list(reader.tensor(names[0]).dims) != [width, rows]:
        raise ArtifactError(f"{reader.folder}: {reader.node.name} has the shape of another layer than {name}")
    if not looked_up and form.block is not None and reader.attribute("block_size") != form.block:
        raise ArtifactError(f"{reader.folder}: {reader.node.name} has another block_size than {name}")
    stored = StandardWeight(
        reader.raw(names[0]),
        reader.raw(scales_name).view(np.float32),
        None if points_name is None else reader.raw(points_name),
    )
    yield name, decode(stored, form, spec, (rows, width), name)
