"""State of a fixed size as an OpenVINO variable, for the rules of short convolutions and of linear attention.

    Broadcast(0, [B, …]) ─ ReadValue ─ Gather(beam_idx) ─▶ past        new ─▶ Assign

One variable for each, ``past.<layer>.<kind>present.<layer>.<kind>``; a request that is reset begins with zeros, in any
batch size.  Unlike keys and values such a state does not grow, and cannot be cut back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import openvino as ov
from openvino import opset15 as ops
from openvino.op.util import Variable, VariableInfo

from .attention import beam_idx
from .graph import Graph, dimension, integer, integers, scalar

if TYPE_CHECKING:
    from roundexport.graph.states import StateInfo


class State:
    """One state in a graph.

    Args:
        graph: the conversion.
        info: the state.
        x: any tensor whose first axis is the batch.

    Attributes:
        past: its value before this run, [B, …].
    """

    def __init__(self, graph: Graph, info: StateInfo, x: Any) -> None:
        description = VariableInfo()
        description.data_shape = ov.PartialShape([-1, *info.shape])
        description.data_type = ov.Type.f32
        description.variable_id = f"past.{info.name}present.{info.name}"
        self._graph, self._variable = graph, Variable(description)
        batch = graph.once("batch", lambda: dimension(x, 0))
        initial = ops.broadcast(scalar(0.0), ops.concat([batch, integers(*info.shape)], 0))
        self.past = ops.gather(ops.read_value(initial, self._variable), beam_idx(graph, batch), integer(0))

    def keep(self, value: Any) -> None:
        """Give it its value behind this run."""
        self._graph.variables.append(self._variable)
        self._graph.sinks.append(ops.assign(value, self._variable))
