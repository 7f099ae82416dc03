"""Rule: rope(q, k, cos, sin, index) -> x·cos + rotate_half(x)·sin on q and k, spelled as plugins fuse it to RoPE.

cos and sin come from the graph, computed in float32 from position_ids once per pass; [B, S, D] gets a head axis here.

OpenVINO's front end cannot take an operator with two results from Python, so the program's rope nodes are first split
into one `rotate` node for q and one for k.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from openvino import opset15 as ops

from .graph import Call, Graph, integer, integers, scalar

PLACEHOLDER = "roundexport.rotate.default"

_LIBRARY = torch.library.Library("roundexport", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.impl("rotate", lambda x, cos, sin: torch.empty_like(x), "Meta")  # type: ignore[no-untyped-call]


def with_split_ropes(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """A copy of the program with one rotate node for each of the two results of every rope node."""
    program = copy.deepcopy(program)
    graph = program.graph
    for node in list(graph.nodes):
        if node.target is not torch.ops.roundexport.rope.default:
            continue
        cos, sin = node.args[2:4]
        for result in list(node.users):
            if result.target is not operator.getitem:
                raise AssertionError(f"{result} takes both results of a rope at once")
            with graph.inserting_before(result):
                single = graph.call_function(
                    torch.ops.roundexport.rotate.default, (node.args[result.args[1]], cos, sin)
                )
            single.meta = dict(result.meta)
            result.replace_all_uses_with(single)
            graph.erase_node(result)
        graph.erase_node(node)
    return program


def lower(graph: Graph, call: Call) -> list[Any]:
    """Lower one rotate node."""
    x = call.tensor(0)
    cos, sin = (_with_head_axis(graph, call.tensor(position)) for position in (1, 2))
    width = x.get_partial_shape()[3].get_length()
    halves = ops.variadic_split(x, integer(3), integers(width // 2, width // 2))
    turned = ops.concat([ops.multiply(halves.output(1), scalar(-1.0)), halves.output(0)], -1)
    graph.fusions["rope"] += 1
    return list(ops.add(ops.multiply(x, cos), ops.multiply(turned, sin)).outputs())


def _with_head_axis(graph: Graph, table: Any) -> Any:
    node = table.get_node()
    return graph.once(("rope", node.get_name(), table.get_index()), lambda: ops.unsqueeze(table, integer(1)))
