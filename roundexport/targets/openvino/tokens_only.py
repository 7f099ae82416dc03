"""Rule: tokens_only(x, mask) -> x [B, S, H] times the mask's last S columns, so that padding leaves states at zero.

Right for padding on the left, as clients of OpenVINO pad; a state that begins behind padding has seen zeros only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as ops

from .graph import Call, Graph, dimension, integers

PLACEHOLDER = "roundexport.tokens_only.default"
_END = np.iinfo(np.int64).max


def lower(graph: Graph, call: Call) -> list[Any]:
    """Lower one product with the mask."""
    x = call.tensor(0)
    return list(ops.multiply(x, graph.once("new tokens", lambda: _new(x, call.tensor(1)))).outputs())


def _new(x: Any, mask: Any) -> Any:
    """[B, S, 1], 1.0 where a new token is one."""
    start = ops.negative(dimension(x, 1))
    new = ops.slice(mask, start, integers(_END), integers(1), integers(1))
    return ops.unsqueeze(ops.convert(new, ov.Type.f32), integers(2))
