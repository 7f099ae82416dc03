"""Rule: embedding(ids, index, width) -> Gather of rows from the weight, which plugins unpack row by row."""

from __future__ import annotations

from typing import Any

import openvino as ov
from openvino import opset15 as ops

from .graph import Call, Graph, integer
from .weight import weight_node

PLACEHOLDER = "roundexport.embedding.default"


def lower(graph: Graph, call: Call) -> list[Any]:
    """Lower one embedding placeholder."""
    info = graph.capture.embeddings[call.index(1)]
    table = weight_node(graph, info.name)
    rows = ops.convert(call.tensor(0), ov.Type.i32)
    return list(ops.gather(table, rows, integer(0), name=info.name).outputs())
