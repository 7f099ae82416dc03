"""Averages of values that older tokens fade out of (RWKV): a Scan over tokens that carries sums and largest exponents.

    past.<layer>.recurrent [B, 3, C] ─ Split ─▶ sums, weights, largest ─▶ Scan ─▶ Concat ─▶ present.<layer>.recurrent

Exponents are taken less the largest so far, as transformers does, so that none overflows (graph/states.py).  A state of
zeros, which is what every client begins with, has no weights yet: its largest exponent is that of nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from roundexport.graph.capture import Capture
from roundexport.graph.states import StateInfo

from .graph import PLACEHOLDER, Editor, integer
from .states import finish, state_ports
from .translate import BATCH, NEW

_LOWEST = -1e38  # the largest exponent of nothing
_FLOAT = ir.TensorType(ir.DataType.FLOAT)


def lower(editor: Editor, captured: Capture) -> None:
    """Lower every such placeholder."""
    for node in editor.nodes("weighted_average", PLACEHOLDER):
        _average(editor, node, captured.states[integer(node, "index")])


def _average(editor: Editor, node: ir.Node, info: StateInfo) -> None:
    k, v, decay, first = node.inputs
    if k is None or v is None or decay is None or first is None:
        raise AssertionError("the placeholder has four tensors")
    _, width = info.shape
    past, present = state_ports(editor, info)
    row, one = (BATCH, width), (BATCH, 1, width)
    parts = editor.insert(node, "Split", [past], [one] * 3, {"axis": 1, "num_outputs": 3})
    sums, weights, largest = (editor.insert(node, "Squeeze", [part, editor.constant([1])], [row])[0] for part in parts)
    zero, lowest = (editor.constant(np.array(value, np.float32)) for value in (0, _LOWEST))
    empty = editor.insert(node, "Equal", [weights, zero], [row], dtype=ir.DataType.BOOL)[0]
    largest = editor.insert(node, "Where", [empty, lowest, largest], [row])[0]
    attributes = {
        "body": _body(width, decay, first),
        "num_scan_inputs": 2,
        "scan_input_axes": [1, 1],
        "scan_output_axes": [1],
    }
    name = f"layers.{info.layer}/WeightedAverage"
    shapes = [row, row, row, (BATCH, NEW, width)]
    *new, found = editor.insert(node, "Scan", [sums, weights, largest, k, v], shapes, attributes, name=name)
    rows = [editor.insert(node, "Unsqueeze", [value, editor.constant([1])], [one])[0] for value in new]
    state = editor.insert(node, "Concat", rows, [(BATCH, *info.shape)], {"axis": 1})[0]
    finish(editor, node, found, state, present)
    editor.log.fusions["weighted average"] += 1


class _Body:
    """The graph of one token, in which every value has one shape.

    Args:
        width: of its rows.
    """

    def __init__(self, width: int) -> None:
        self._shape = BATCH, width
        self.nodes: list[ir.Node] = []

    def value(self, name: str) -> ir.Value:
        """An input."""
        return ir.Value(name=name, shape=ir.Shape(self._shape), type=_FLOAT)

    def call(self, op_type: str, *inputs: ir.Value) -> ir.Value:
        """The output of an operator."""
        node = ir.node(op_type, inputs)
        out = node.outputs[0]
        out.name, out.shape, out.type = f"value_{len(self.nodes)}", ir.Shape(self._shape), _FLOAT
        self.nodes.append(node)
        return out

    def average(
        self, sums: ir.Value, weights: ir.Value, value: ir.Value, before: ir.Value, exponent: ir.Value
    ) -> Sequence[ir.Value]:
        """Both sums with one token more, less the larger exponent; and that exponent."""
        above = self.call("Max", before, exponent)
        old, new = (self.call("Exp", self.call("Sub", x, above)) for x in (before, exponent))
        entering = self.call("Mul", new, value)
        return (
            self.call("Add", self.call("Mul", old, sums), entering),
            self.call("Add", self.call("Mul", old, weights), new),
            above,
        )


def _body(width: int, decay: ir.Value, first: ir.Value) -> ir.Graph:
    body = _Body(width)
    sums, weights, largest, key, value = (body.value(name) for name in ("sums", "weights", "largest", "key", "value"))
    told, of_weights, _ = body.average(sums, weights, value, largest, body.call("Add", key, first))
    found = body.call("Div", told, of_weights)
    kept = body.average(sums, weights, value, body.call("Add", largest, decay), key)
    return ir.Graph([sums, weights, largest, key, value], [*kept, found], nodes=body.nodes, name="one_token")
