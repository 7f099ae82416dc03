"""Tables of cosines and sines, evaluated from a traced program where angles depend on positions alone.

Embeddings with equal angles share one table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .rotary import ROPE


@dataclass(frozen=True)
class RopeTable:
    """cos and sin of one rotary embedding for positions 0 … max_context-1, float32 [max_context, R/2]."""

    cos: Tensor
    sin: Tensor


def rope_tables(program: torch.export.ExportedProgram, length: int) -> tuple[tuple[RopeTable, ...], dict[int, int]]:
    """Cosines and sines for all positions, evaluated from the graph itself.

    Args:
        program: the captured program.
        length: positions.

    Returns:
        Distinct tables; index of a rope placeholder -> place of its table, absent where angles depend on
        other inputs, or positions have several axes.
    """
    tables: list[RopeTable] = []
    table_of: dict[int, int] = {}
    known: dict[tuple[Node, Node], int | None] = {}
    for node in program.graph.nodes:
        if node.target is not ROPE:
            continue
        _, cos, sin, index, _ = node.args
        if (cos, sin) not in known:
            known[cos, sin] = _place(tables, _evaluate(program, (cos, sin), length))
        if (place := known[cos, sin]) is not None:
            table_of[index] = place
    return tuple(tables), table_of


def _place(tables: list[RopeTable], found: tuple[Tensor, Tensor] | None) -> int | None:
    """The place of the table with these values, added where it is new."""
    if found is None:
        return None
    for place, table in enumerate(tables):
        if torch.equal(table.cos, found[0]) and torch.equal(table.sin, found[1]):
            return place
    tables.append(RopeTable(*found))
    return len(tables) - 1


def _evaluate(
    program: torch.export.ExportedProgram, nodes: tuple[Node, Node], length: int
) -> tuple[Tensor, Tensor] | None:
    """Values of graph nodes for positions 0 … length-1, or None where they depend on any other input."""
    signature = program.graph_signature
    constants = {**program.state_dict, **program.constants}
    stored = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    values: dict[Node, Any] = {}

    class _Elsewhere(Exception):  # noqa: N818
        pass

    def value(node: Any) -> Any:
        if not isinstance(node, Node):
            return node
        if node not in values:
            if node.op == "placeholder" and node.name == "position_ids" and node.meta["val"].ndim == 2:
                values[node] = torch.arange(length)[None]
            elif node.op == "placeholder" and node.name in stored:
                values[node] = constants[stored[node.name]]
            elif node.op == "call_function" and callable(node.target):
                values[node] = node.target(*torch.fx.map_arg(node.args, value), **torch.fx.map_arg(node.kwargs, value))
            else:
                raise _Elsewhere
        return values[node]

    try:
        with torch.no_grad():
            cos, sin = (value(node)[0].float().contiguous() for node in nodes)
            return cos, sin
    except _Elsewhere:
        return None
