"""Rule: causal_conv(x, weight, bias, index, silu) -> Concat(state, x) ─ GroupConvolution; the last columns stay."""

from __future__ import annotations

from typing import Any

import numpy as np
from openvino import opset15 as ops

from .graph import Call, Graph, integers
from .states import State

PLACEHOLDER = "roundexport.causal_conv.default"
_END = np.iinfo(np.int64).max


def lower(graph: Graph, call: Call) -> list[Any]:
    """Lower one convolution along the text."""
    x, weight, bias = call.tensor(0), call.tensor(1), call.optional(2)
    info = graph.capture.states[call.index(3)]
    channels, before = info.shape
    state = State(graph, info, x)
    columns = ops.concat([state.past, x], 2)
    kernels = ops.reshape(weight, integers(channels, 1, 1, before + 1), False)
    y = ops.group_convolution(columns, kernels, [1], [0], [0], [1])
    state.keep(ops.slice(columns, integers(-before), integers(_END), integers(1), integers(2)))
    if bias is not None:
        y = ops.add(y, ops.reshape(bias, integers(1, channels, 1), False))
    if call.index(4):
        y = ops.swish(y)
    graph.fusions["causal convolution"] += 1
    return list(y.outputs())
