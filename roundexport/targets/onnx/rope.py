"""Rotary embeddings that did not go into an attention operator.

    angles by position alone            com.microsoft::RotaryEmbedding, its tables initializers, by position_ids
    cos and sin without a batch axis    the same, its tables computed in the graph, rows in order   (encoders)
    anything else                       the formula of graph/rotary.py in plain operators

x [B, H, S, D], of which the first R turn; cos and sin [B or 1, S, R/2].
"""

from __future__ import annotations

import onnx_ir as ir

from .graph import MICROSOFT, PLACEHOLDER, Dim, Editor, dims, integer
from .reshapes import heads_first, heads_last
from .rotary_tables import RotaryTables
from .tidy import split


def lower(editor: Editor, tables: RotaryTables | None) -> None:
    """Lower every rope placeholder that is left; without tables in plain operators, as the standard dialect has it."""
    positions = next((value for value in editor.graph.inputs if value.name == "position_ids"), None)
    for node in editor.nodes("rope", PLACEHOLDER):
        if not node.outputs[0].uses():  # an attention operator turns what it turned
            editor.remove(node)
            continue
        rule, known = "rotary operator", None if tables is None else tables.of(node)
        if positions is not None and known is not None:
            turned = _operator(editor, node, positions, known)
        elif tables is not None and (dims(node.inputs[1]) or (0,))[0] == 1:
            start = editor.constant([0])  # row 0 of the tables is the first position
            turned = _operator(editor, node, start, tuple(_flat(editor, node, table) for table in node.inputs[1:]))
        else:
            rule, turned = "rotary in plain operators", _plain(editor, node)
        editor.log.fusions[rule] += 1
        editor.replace(node.outputs[0], turned)
        editor.remove(node)


def _operator(editor: Editor, node: ir.Node, positions: ir.Value, tables: tuple[ir.Value, ...]) -> ir.Value:
    value = node.inputs[0]
    flat = heads_last(editor, node, value)  # the operator takes this form too, and so do the attention operators
    _, heads, _, width = dims(value) or ()
    turned = 2 * int((dims(node.inputs[1]) or (0,))[-1])
    attributes = {"num_heads": int(heads), "interleaved": integer(node, "interleaved")}
    if turned < int(width):
        attributes["rotary_embedding_dim"] = turned
    (out,) = editor.insert(node, "RotaryEmbedding", [flat, positions, *tables], [dims(flat)], attributes, MICROSOFT)
    return heads_first(editor, node, out, int(heads), int(width))


def _flat(editor: Editor, node: ir.Node, table: ir.Value | None) -> ir.Value:
    """[1, S, R/2] as [S, R/2]."""
    assert table is not None
    return editor.insert(node, "Squeeze", [table, editor.constant([0])], [(dims(table) or ())[1:]])[0]


def _plain(editor: Editor, node: ir.Node) -> ir.Value:
    value, interleaved = node.inputs[0], integer(node, "interleaved")
    *leading, width = dims(value) or ()
    half = int((dims(node.inputs[1]) or (0,))[-1])
    pieces = split(editor, node, value, [2 * half, int(width) - 2 * half]) if 2 * half < int(width) else [value]
    part: tuple[Dim, ...] = (*leading, half)
    if interleaved:
        steps = [[editor.constant([number]) for number in (start, 2 * half, -1, 2)] for start in (0, 1)]
        a, b = (editor.insert(node, "Slice", [pieces[0], *step], [part])[0] for step in steps)
    else:
        a, b = split(editor, node, pieces[0], [half, half])
    tables = []
    for table in node.inputs[1:]:
        batch, length, columns = dims(table) or ()
        tables += editor.insert(node, "Unsqueeze", [table, editor.constant([1])], [(batch, 1, length, columns)])
    cos, sin = tables
    found = []
    for op_type, one, other in (("Sub", a, b), ("Add", b, a)):
        terms = [editor.insert(node, "Mul", [x, table], [part])[0] for x, table in ((one, cos), (other, sin))]
        found += editor.insert(node, op_type, terms, [part])
    if interleaved:
        pair: tuple[Dim, ...] = (*part, 1)
        found = [editor.insert(node, "Unsqueeze", [x, editor.constant([-1])], [pair])[0] for x in found]
        (stacked,) = editor.insert(node, "Concat", found, [(*part, 2)], {"axis": -1})
        target = editor.constant([0, 0, 0, 2 * half])
        found = editor.insert(node, "Reshape", [stacked, target], [(*leading, 2 * half)])
    found += pieces[1:]
    return editor.insert(node, "Concat", found, [(*leading, width)], {"axis": -1})[0] if len(found) > 1 else found[0]
