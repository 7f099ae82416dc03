"""Rule: grouped_linear(x, counts, index, out_features) -> VariadicSplit ─ a MatMul for each piece ─ Concat.

x is sorted by expert; counts says how many rows each has.  The CPU plugin keeps every weight compressed, as that of any
FullyConnected, and does not run nodes whose input has no rows: a token that is decoded reads the weights of its chosen
experts only (openvino 2026.4.1, seen in the times that its profile gives).
"""

from __future__ import annotations

from typing import Any

from openvino import opset15 as ops

from .graph import Call, Graph, integer
from .linear import linear

PLACEHOLDER = "roundexport.grouped_linear.default"


def lower(graph: Graph, call: Call) -> list[Any]:
    """Lower the products of one layer's experts."""
    group = graph.capture.groups[call.index(2)]
    pieces = ops.variadic_split(call.tensor(0), integer(0), call.tensor(1))
    done = []
    for piece, indices in zip(pieces.outputs(), group, strict=True):
        found = [linear(graph, piece, graph.capture.linears[index]) for index in indices]
        done.append(found[0] if len(found) == 1 else ops.concat(found, -1))
    graph.fusions["experts"] += 1
    return list(ops.concat(done, 0).outputs())
