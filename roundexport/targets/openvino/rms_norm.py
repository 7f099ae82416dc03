"""Rule: rms_norm(x, weight, eps) -> x · 1/sqrt(mean(x²) + eps) · weight, spelled as plugins fuse it to RMS."""

from __future__ import annotations

from typing import Any

from openvino import opset15 as ops

from .graph import Call, Graph, integers, scalar

PLACEHOLDER = "roundexport.rms_norm.default"


def lower(graph: Graph, call: Call) -> list[Any]:
    """Lower one RMS norm placeholder."""
    x = call.tensor(0)
    mean = ops.reduce_mean(ops.power(x, scalar(2.0)), integers(-1), True)
    inverse = ops.divide(scalar(1.0), ops.sqrt(ops.add(mean, scalar(call.number(2)))))
    graph.fusions["rms_norm"] += 1
    return list(ops.multiply(ops.multiply(x, inverse), call.tensor(1)).outputs())
