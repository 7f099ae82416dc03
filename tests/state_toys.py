"""What toys of runtime_toys.py get in front of their layers where a state of a fixed size is to be carried."""

from __future__ import annotations

from typing import Any

import numpy as np
from runtime_toys import HIDDEN, KV_HEADS, _index, _ov_state

TAPS = 3


def onnx_states(graph: Any, random: Any, x: str, out: str) -> None:
    """out = x + linear attention of a short convolution of x."""
    from onnx import TensorProto

    heads = KV_HEADS
    graph.constant("taps", random(HIDDEN, 1, TAPS, size=1.0))
    graph.constant("rate", random(HIDDEN, heads))
    graph.node("Transpose", [x], "columns", perm=[0, 2, 1])
    inputs = ["columns", "taps", "", "past.0.conv"]
    graph.node("CausalConvWithState", inputs, "mixed", "present.0.conv", domain="com.microsoft")
    graph.node("Transpose", ["mixed"], "rows", perm=[0, 2, 1])
    graph.node("MatMul", ["rows", "rate"], "rates")
    graph.node("Sigmoid", ["rates"], "risen")
    graph.node("Neg", ["risen"], "decay")
    attributes = {"q_num_heads": heads, "kv_num_heads": heads, "update_rule": "gated", "scale": 0.1}
    inputs, outputs = ["rows", "rows", "rows", "past.1.recurrent", "decay"], ("told", "present.1.recurrent")
    graph.node("LinearAttention", inputs, *outputs, domain="com.microsoft", **attributes)
    graph.node("Add", [x, "told"], out)
    for name, shape in (("0.conv", [HIDDEN, TAPS - 1]), ("1.recurrent", [heads, HIDDEN // heads, HIDDEN // heads])):
        graph.input(f"past.{name}", ["b", *shape], TensorProto.FLOAT)
        graph.output(f"present.{name}", ["b", *shape])


def ov_states(x: Any, random: Any, inputs: dict[str, Any], sinks: list[Any]) -> Any:
    """x + a tenth of the sum of a convolution of x so far, of which a tenth fades with every token."""
    import openvino.opset15 as op

    past, conv = _ov_state("past.0.convpresent.0.conv", (HIDDEN, TAPS - 1), inputs)
    columns = op.concat([past, op.transpose(x, _index([0, 2, 1]))], 2)
    taps = op.constant(random(HIDDEN, 1, 1, TAPS))
    rows = op.transpose(op.group_convolution(columns, taps, [1], [0], [0], [1]), _index([0, 2, 1]))
    ends = _index([1 - TAPS]), _index([2**31 - 1]), _index([1]), _index([2])
    sinks.append(op.assign(op.slice(columns, *ends), conv))
    past, recurrent = _ov_state("past.1.recurrentpresent.1.recurrent", (HIDDEN,), inputs)
    length = op.gather(op.shape_of(rows, "i64"), _index(1), _index(0))
    places = op.convert(op.range(_index(0), length, _index(1), "i64"), "f32")
    age = op.subtract(op.unsqueeze(places, _index(1)), op.unsqueeze(places, _index(0)))
    fading = op.multiply(
        op.power(op.constant(np.float32(0.9)), age),
        op.convert(op.greater_equal(age, op.constant(np.float32(0))), "f32"),
    )
    faded = op.power(op.constant(np.float32(0.9)), op.unsqueeze(op.add(places, op.constant(np.float32(1))), _index(1)))
    told = op.add(op.matmul(fading, rows, False, False), op.multiply(op.unsqueeze(past, _index(1)), faded))
    sinks.append(op.assign(op.gather(told, _index(-1), _index(1)), recurrent))
    return op.add(x, op.multiply(told, op.constant(np.float32(0.1))))
