"""Rule: linear(x, index, out_features) -> MatMul(x, weight, transpose_b) [+ bias].

The last node carries the module's path as friendly name: with it the layer can be found in a compiled model, where a
bias is part of the FullyConnected.
"""

from __future__ import annotations

from typing import Any

from openvino import opset15 as ops

from .constants import float_constant
from .graph import Call, Graph
from .weight import weight_node

PLACEHOLDER = "roundexport.linear.default"


def lower(graph: Graph, call: Call) -> list[Any]:
    """Lower one linear placeholder."""
    info = graph.capture.linears[call.index(1)]
    weight = weight_node(graph, info.name)
    biased = info.name in graph.capture.biased
    product = ops.matmul(call.tensor(0), weight, False, True, name=f"{info.name}/product" if biased else info.name)
    if not biased:
        return list(product.outputs())
    bias = graph.once(("bias", info.name), lambda: float_constant(graph.weights.bias(info.name), f"{info.name}.bias"))
    return list(ops.add(product, bias, name=info.name).outputs())
