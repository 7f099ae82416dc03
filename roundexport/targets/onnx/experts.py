"""Products of experts: one linear per expert over its own rows of what was sorted by expert.

    grouped_linear(x, counts)    ->    Split(x, counts) ─ a linear for each piece ─ Concat

The placeholder is expanded to placeholders of linears, which are then lowered as all others: MatMulNBits on the
artifact's integers, or MatMul.  Pieces without rows cost a call and read no weights, so a token that is decoded reads
those of its chosen experts only.  Gate and up of an expert become one product where both are stored in one form.
"""

from __future__ import annotations

import onnx_ir as ir

from .graph import PLACEHOLDER, Editor, dims, integer
from .linears import LinearStore


def expand(editor: Editor, store: LinearStore) -> None:
    """Expand every placeholder of experts."""
    for number, node in enumerate(editor.nodes("grouped_linear", PLACEHOLDER)):
        editor.replace(node.outputs[0], _expanded(editor, node, store, number))
        editor.remove(node)
        editor.log.fusions["experts"] += 1


def _expanded(editor: Editor, node: ir.Node, store: LinearStore, number: int) -> ir.Value:
    group = store.captured.groups[integer(node, "index")]
    x, counts = node.inputs
    width = (dims(x) or (0,))[-1]
    names = [f"rows_{number}_{expert}" for expert in range(len(group))]
    pieces = editor.insert(node, "Split", [x, counts], [(name, width) for name in names], {"axis": 0})
    done = [
        _of_one(editor, node, store, piece, indices, name)
        for piece, indices, name in zip(pieces, group, names, strict=True)
    ]
    return editor.insert(node, "Concat", done, [dims(node.outputs[0])], {"axis": 0})[0]


def _of_one(
    editor: Editor, before: ir.Node, store: LinearStore, x: ir.Value, indices: tuple[int, ...], rows: str
) -> ir.Value:
    """Outputs of one expert's linears side by side."""
    keys = [store.merge_key((index,)) for index in indices]
    together = None not in keys and len(set(keys)) == 1
    found = []
    for part in [indices] if together else [(index,) for index in indices]:
        width = sum(store.captured.linears[index].out_features for index in part)
        found += editor.insert(before, "linear", [x], [(rows, width)], {"indices": list(part)}, PLACEHOLDER)
    if len(found) == 1:
        return found[0]
    width = sum(store.captured.linears[index].out_features for index in indices)
    return editor.insert(before, "Concat", found, [(rows, width)], {"axis": -1})[0]
