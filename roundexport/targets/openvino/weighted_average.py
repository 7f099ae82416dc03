"""Rule: weighted_average(k, v, decay, first, index) -> a Loop over tokens that carries sums and the largest exponent.

Exponents are taken less the largest so far, as transformers does, so that none overflows (graph/states.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as ops

from .graph import Call, Graph, integer, integers, scalar
from .states import State

PLACEHOLDER = "roundexport.weighted_average.default"
_LOWEST = -1e38  # the largest exponent of nothing


def lower(graph: Graph, call: Call) -> list[Any]:
    """Lower one layer's average."""
    k, v, decay, first = (call.tensor(position) for position in range(4))
    info = graph.capture.states[call.index(4)]
    width = info.shape[1]
    state = State(graph, info, v)
    sums, weights, largest = ops.split(state.past, integer(1), 3).outputs()  # [B, 1, C] each
    largest = ops.select(ops.equal(weights, scalar(0.0)), scalar(_LOWEST), largest)
    rows = [ops.reshape(x, integers(1, 1, width), False) for x in (decay, first)]
    found, new = _token_by_token(k, v, rows, [sums, weights, largest.output(0)])
    state.keep(ops.concat(new, 1))
    graph.fusions["weighted average"] += 1
    return list(found.outputs())


def _token_by_token(k: Any, v: Any, rows: list[Any], past: list[Any]) -> tuple[Any, list[Any]]:
    shape = ops.shape_of(v, ov.Type.i64)
    count = ops.convert(ops.gather(shape, integer(1), integer(0)), ov.Type.i32)
    time = ops.parameter([], np.int32, name="time")
    key, value = (ops.parameter([-1, 1, -1], np.float32, name=name) for name in ("key", "value"))
    decay, first = (ops.parameter([1, 1, -1], np.float32, name=name) for name in ("decay", "first"))
    sums, weights, largest = (ops.parameter([-1, 1, -1], np.float32, name=f"past_{i}") for i in range(3))
    told = _average(sums, weights, value, largest, ops.add(key, first))[:2]
    *after, above = _average(sums, weights, value, ops.add(largest, decay), key)
    found = ops.divide(*told)
    kept = [*after, above]
    body = ov.Model(
        [ops.constant([True], dtype=bool), found, *kept],
        [time, key, value, decay, first, sums, weights, largest],
        "one token",
    )
    loop = ops.loop(count, ops.constant(True, dtype=bool))
    loop.set_function(body)
    loop.set_sliced_input(key, k, 0, 1, 1, -1, 1)
    loop.set_sliced_input(value, v, 0, 1, 1, -1, 1)
    for parameter, outer in zip((decay, first), rows, strict=True):
        loop.set_invariant_input(parameter, outer.output(0))
    for parameter, outer, inner in zip((sums, weights, largest), past, kept, strict=True):
        loop.set_merged_input(parameter, outer, inner.output(0))
    loop.set_special_body_ports([0, 0])
    whole = loop.get_concatenated_slices(found.output(0), 0, 1, 1, -1, 1)
    return whole.get_node() if hasattr(whole, "get_node") else whole, [
        loop.get_iter_value(value.output(0), -1) for value in kept
    ]


def _average(sums: Any, weights: Any, value: Any, before: Any, exponent: Any) -> tuple[Any, Any, Any]:
    """Both sums with one token more, less the larger exponent; and that exponent."""
    above = ops.maximum(before, exponent)
    old, new = (ops.exp(ops.subtract(x, above)) for x in (before, exponent))
    return ops.add(ops.multiply(old, sums), ops.multiply(new, value)), ops.add(ops.multiply(old, weights), new), above
