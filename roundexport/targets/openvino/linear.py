"""Rule: linear(x, index, out_features) -> MatMul(x, weight, transpose_b) [+ bias]; of integers: integer_linear.py.

Those that read one value are one product: siblings.py.  The last node carries the module's path as friendly name: with
it the layer can be found in a compiled model, where a bias is part of the FullyConnected.
"""

from __future__ import annotations

from typing import Any

from openvino import opset15 as ops

from roundexport.quant.spec import LinearInfo

from . import integer_linear, siblings
from .constants import float_constant
from .graph import Call, Graph
from .weight import weight_node

PLACEHOLDER = "roundexport.linear.default"


def lower(graph: Graph, call: Call) -> list[Any]:
    """Lower one linear placeholder, with those that read the same value where that can be."""
    x, index = call.tensor(0), call.index(1)
    together = siblings.siblings(graph, index)
    if len(together) > 1:
        return [siblings.part(graph, x, index, together)]
    return [linear(graph, x, graph.capture.linears[index])]


def linear(graph: Graph, x: Any, info: LinearInfo) -> Any:
    """The output of a linear for an input."""
    biased = info.name in graph.capture.biased
    name = f"{info.name}/product" if biased else info.name
    product = integer_linear.product(graph, x, info, name)
    if product is None:
        product = ops.matmul(x, weight_node(graph, info.name), False, True, name=name)
    if not biased:
        return product.output(0)
    bias = graph.once(("bias", info.name), lambda: float_constant(graph.weights.bias(info.name), f"{info.name}.bias"))
    return ops.add(product, bias, name=info.name).output(0)
