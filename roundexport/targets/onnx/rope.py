"""Rotary embeddings that did not go into an attention operator.

    cos and sin without a batch axis   com.microsoft::RotaryEmbedding, its tables computed in the graph   (encoders)
    anything else                      x·cos + (second half negated, first half)·sin, in plain operators

x [B, H, S, D]; cos and sin [B or 1, S, D], each half of D the same, as the placeholder promises (rotate-half form).
"""

from __future__ import annotations

import onnx_ir as ir

from .decoder_attention import heads_first, heads_last
from .graph import MICROSOFT, PLACEHOLDER, Dim, Editor, dims
from .tidy import split


def lower(editor: Editor) -> None:
    """Lower every rope placeholder that is left."""
    for node in editor.nodes("rope", PLACEHOLDER):
        cos, sin = node.inputs[2:4]
        shape = dims(cos)
        per_row = shape is None or shape[0] != 1
        turn = _plain if per_row else _operator
        for value, old in zip(node.inputs[:2], node.outputs, strict=True):
            editor.replace(old, turn(editor, node, value, cos, sin))
        editor.remove(node)
        editor.log.fusions["rotary in plain operators" if per_row else "rotary operator"] += 1


def _operator(editor: Editor, node: ir.Node, value: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
    tables = [_table(editor, node, table) for table in (cos, sin)]
    offset = editor.constant([0])  # row 0 of the tables is the first position
    flat = heads_last(editor, node, value)  # the operator takes this form too, and so do the attention operators
    _, heads, _, width = dims(value) or ()
    attributes = {"num_heads": int(heads), "interleaved": 0}
    (turned,) = editor.insert(node, "RotaryEmbedding", [flat, offset, *tables], [dims(flat)], attributes, MICROSOFT)
    return heads_first(editor, node, turned, int(heads), int(width))


def _table(editor: Editor, node: ir.Node, table: ir.Value) -> ir.Value:
    """First half of the last axis of [1, S, D], as [S, D/2]."""
    length, width = (dims(table) or ())[1:]
    half = int(width) // 2
    first, _ = split(editor, node, table, [half, half])
    (flat,) = editor.insert(node, "Squeeze", [first, editor.constant([0])], [(length, half)])
    return flat


def _plain(editor: Editor, node: ir.Node, value: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
    shape = dims(value) or ()
    half = int(shape[-1]) // 2
    first, second = split(editor, node, value, [half, half])
    (negated,) = editor.insert(node, "Neg", [second], [dims(second)])
    (turned,) = editor.insert(node, "Concat", [negated, first], [shape], {"axis": -1})
    products = []
    for x, table in ((value, cos), (turned, sin)):
        a, b, c = dims(table) or ()
        heads: tuple[Dim, ...] = (a, 1, b, c)
        (wide,) = editor.insert(node, "Unsqueeze", [table, editor.constant([1])], [heads])
        products += editor.insert(node, "Mul", [x, wide], [shape])
    (result,) = editor.insert(node, "Add", products, [shape])
    return result
