"""State other than keys and values: com.microsoft::CausalConvWithState and LinearAttention, with inputs and outputs.

    past.<layer>.conv       [B, C, K-1]         ──▶  present.<layer>.conv
    past.<layer>.recurrent  [B, H, Dk, Dv]      ──▶  present.<layer>.recurrent

One graph serves prefill and decode; an empty state is zeros.  Both kernels read a row's old state before they write the
new one, so past and present may be the same memory.  LinearAttention goes through the tokens one by one, each head on a
thread of its own.

Limits: every column of a run must be a token of its row: a state knows no padding, not even on the right, where
attention bears it.  The runtime reads prompts of unequal length row by row.
Source: operator schemas and CPU kernels of onnxruntime 1.31.1, contrib_ops/cpu/bert/linear_attention.cc and
causal_conv_with_state.cc.
"""

from __future__ import annotations

import onnx_ir as ir

from roundexport.graph.capture import Capture
from roundexport.graph.states import StateInfo

from .graph import MICROSOFT, PLACEHOLDER, Dim, Editor, dims, integer, made_by, number
from .reshapes import reshape
from .translate import BATCH, NEW


def lower(editor: Editor, captured: Capture) -> None:
    """Lower every placeholder of a state."""
    for node in editor.nodes("tokens_only", PLACEHOLDER):
        editor.replace(node.outputs[0], node.inputs[0])
        editor.remove(node)
    for node in editor.nodes("causal_conv", PLACEHOLDER):
        _convolution(editor, node, captured.states[integer(node, "index")])
    for node in editor.nodes("linear_attention", PLACEHOLDER):
        _linear_attention(editor, node, captured.states[integer(node, "index")])


def _convolution(editor: Editor, node: ir.Node, info: StateInfo) -> None:
    x, weight, bias = (*node.inputs, None)[:3]
    past, present = state_ports(editor, info)
    inputs = [x, _three_axes(editor, node, weight), bias, past]
    attributes = {"activation": "silu" if integer(node, "silu") else "none"}
    shapes = [dims(node.outputs[0]), dims(present)]
    name = f"layers.{info.layer}/CausalConvWithState"
    y, state = editor.insert(node, "CausalConvWithState", inputs, shapes, attributes, MICROSOFT, name=name)
    finish(editor, node, y, state, present)
    editor.log.fusions["causal convolution"] += 1


def _three_axes(editor: Editor, before: ir.Node, weight: ir.Value) -> ir.Value:
    """The weight [C, K] as [C, 1, K], which it was before the model took the axis away."""
    squeezed = made_by(weight, "Squeeze")
    if squeezed is not None and len(dims(squeezed.inputs[0]) or ()) == 3:
        return squeezed.inputs[0]
    channels, taps = dims(weight) or ()
    return editor.insert(before, "Unsqueeze", [weight, editor.constant([1])], [(channels, 1, taps)])[0]


def _linear_attention(editor: Editor, node: ir.Node, info: StateInfo) -> None:
    q, k, v, decay, beta = (*node.inputs, None)[:5]
    heads, _, width = info.shape
    past, present = state_ports(editor, info)
    if len(dims(decay) or ()) == 4:  # one for every row of the state
        decay = _flat(editor, node, decay)
    inputs = [*(_flat(editor, node, value) for value in (q, k, v)), past, decay, beta]
    attributes = {
        "q_num_heads": integer(node, "groups"),
        "kv_num_heads": heads,
        "scale": number(node, "scale"),
        "update_rule": "gated" if beta is None else "gated_delta",
    }
    shapes: list[tuple[Dim, ...] | None] = [(BATCH, NEW, heads * width), dims(present)]
    name = f"layers.{info.layer}/LinearAttention"
    flat, state = editor.insert(
        node, "LinearAttention", inputs[: 5 if beta is None else 6], shapes, attributes, MICROSOFT, name=name
    )
    finish(editor, node, reshape(editor, node, flat, (BATCH, NEW, heads, width)), state, present)
    editor.log.fusions["linear attention"] += 1


def _flat(editor: Editor, before: ir.Node, value: ir.Value) -> ir.Value:
    """[B, S, H, D] as [B, S, H·D]."""
    batch, length, heads, width = dims(value) or ()
    return reshape(editor, before, value, (batch, length, int(heads) * int(width)))


def state_ports(editor: Editor, info: StateInfo) -> tuple[ir.Value, ir.Value]:
    """The past input, added to the graph, and a stand-in with the name and shape of the present output."""
    found = []
    for name in (f"past.{info.name}", f"present.{info.name}"):
        kind = ir.TensorType(ir.DataType.FLOAT)
        found.append(ir.Value(name=name, shape=ir.Shape([BATCH, *info.shape]), type=kind))
    editor.graph.inputs.append(found[0])
    return found[0], found[1]


def finish(editor: Editor, node: ir.Node, y: ir.Value, state: ir.Value, present: ir.Value) -> None:
    """Put an operator's outputs in the place of a placeholder and of the present output."""
    state.name = present.name
    editor.graph.outputs.append(state)
    editor.replace(node.outputs[0], y)
    editor.remove(node)
