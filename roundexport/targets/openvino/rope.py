"""Rule: rope(x, cos, sin, index, interleaved), spelled as plugins fuse it to one RoPE operator.

    halves        x·cos + (-second half, first half)·sin, cos and sin [B, 1, S, R], each half the same
    a part        VariadicSplit ─ the front turned ─ Concat with the rest
    interleaved   firsts of all pairs, then seconds, by a Gather of the last axis, and the above

The CPU plugin (2026.4.1) has no fusion of whole heads whose pairs lie side by side, and for a part of the head only one
that depends on its width.  Where only attention reads the result, a head may leave this rule, and lie in the cache, in
halves (graph/rotary_order.py); elsewhere a second Gather puts its numbers back.

cos and sin come from the graph, computed in float32 from position_ids once per pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from openvino import opset15 as ops

from roundexport.graph.rotary_order import orderless

from .graph import Call, Graph, integer, integers, scalar

PLACEHOLDER = "roundexport.rope.default"


def lower(graph: Graph, call: Call) -> list[Any]:
    """Lower one rope placeholder."""
    x = call.tensor(0)
    width = x.get_partial_shape()[3].get_length()
    turned = 2 * call.tensor(1).get_partial_shape()[2].get_length()
    cos, sin = (_wide(graph, call.tensor(position)) for position in (1, 2))
    interleaved = bool(call.index(4))
    order = np.array([*range(0, turned, 2), *range(1, turned, 2), *range(turned, width)])
    if interleaved:
        x = _reordered(graph, x, order)
    graph.fusions["rope"] += 1
    if turned == width:
        out = _in_halves(x, cos, sin, turned)
    else:
        parts = ops.variadic_split(x, integer(3), integers(turned, width - turned))
        out = ops.concat([_in_halves(parts.output(0), cos, sin, turned), parts.output(1)], -1)
    if interleaved and call.index(3) not in graph.once("orderless", lambda: orderless(graph.capture.program)):
        out = _reordered(graph, out.output(0), np.argsort(order))
    return list(out.outputs())


def _in_halves(x: Any, cos: Any, sin: Any, turned: int) -> Any:
    halves = ops.variadic_split(x, integer(3), integers(turned // 2, turned // 2))
    other = ops.concat([ops.multiply(halves.output(1), scalar(-1.0)), halves.output(0)], -1)
    return ops.add(ops.multiply(x, cos), ops.multiply(other, sin))


def _reordered(graph: Graph, x: Any, order: Any) -> Any:
    """The numbers of each head, taken from these places; in front of a transpose, which RoPE then takes in."""
    places = graph.once(("order", order.tobytes()), lambda: ops.constant(order.astype(np.int64)))
    node = x.get_node()
    if node.get_type_name() != "Transpose":
        return ops.gather(x, places, integer(3))
    return ops.transpose(ops.gather(node.input_value(0), places, integer(3)), node.input_value(1))


def _wide(graph: Graph, table: Any) -> Any:
    """[B, S, R/2] as [B, 1, S, R]."""
    node = table.get_node()
    key = "rope", node.get_name(), table.get_index()
    return graph.once(key, lambda: ops.unsqueeze(ops.concat([table, table], -1), integer(1)))
