"""Norms, and the residual addition in front of them, as single operators.

    rms_norm placeholder          -> SimplifiedLayerNormalization      (default domain, version 1; ONNX Runtime's own)
    Add + rms_norm                -> SkipSimplifiedLayerNormalization  (com.microsoft; output 3 is the sum)
    Add + LayerNormalization      -> SkipLayerNormalization            (com.microsoft; output 3 is the sum)

The skip operators want both summands and the sum to have one shape [B, S, H] and a weight [H].  Their epsilon defaults
to 1e-12, so it is always written.
"""

from __future__ import annotations

import onnx_ir as ir

from .graph import MICROSOFT, PLACEHOLDER, Editor, dims, made_by, number

_SKIP = {
    "SimplifiedLayerNormalization": "SkipSimplifiedLayerNormalization",
    "LayerNormalization": "SkipLayerNormalization",
}


def lower(editor: Editor) -> None:
    """Lower the norm placeholders and fuse residual additions into every norm."""
    for node in editor.nodes("rms_norm", PLACEHOLDER):
        attributes = {"axis": -1, "epsilon": number(node, "eps"), "stash_type": 1}
        shape = dims(node.outputs[0])
        (output,) = editor.insert(node, "SimplifiedLayerNormalization", node.inputs, [shape], attributes)
        editor.replace(node.outputs[0], output)
        editor.remove(node)
        editor.log.fusions["rms norm"] += 1
    for plain in _SKIP:
        for norm in editor.nodes(plain):
            _fuse_skip(editor, norm)


def _fuse_skip(editor: Editor, norm: ir.Node) -> None:
    add = made_by(norm.inputs[0], "Add")
    if add is None:
        return
    shapes = [dims(value) for value in (*add.inputs, add.outputs[0], norm.outputs[0])]
    if None in shapes or len(set(shapes)) != 1 or len(shapes[0] or ()) != 3:
        editor.log.refused.append(("skip norm", f"{add.name}: the summands have shapes {shapes[0]} and {shapes[1]}"))
        return
    shape = shapes[0]
    others = [user for user in add.outputs[0].consumers() if user is not norm] or add.outputs[0].is_graph_output()
    outputs = editor.insert(
        add,
        _SKIP[norm.op_type],
        [*add.inputs, *norm.inputs[1:]],
        [shape, None, None, shape] if others else [shape],
        {"epsilon": number(norm, "epsilon")},
        MICROSOFT,
    )
    editor.replace(norm.outputs[0], outputs[0])
    editor.remove(norm)
    if others:
        editor.replace(add.outputs[0], outputs[3])
    editor.remove(add)
    editor.log.fusions["skip norm"] += 1
