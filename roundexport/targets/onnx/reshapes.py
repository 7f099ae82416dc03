"""Reshapes and transposes that cancel, and target shapes as constants.

    rms_norm(Transpose(x))        -> Transpose(rms_norm(x))    where the normed axis stays last
    Transpose(Transpose(x))       -> x                         where the second undoes the first
    Reshape(Reshape(x))           -> Reshape(x)
    Reshape to the shape it has   -> x
    shape computed at run time    -> constant with 0 (keep this axis) and at most one -1

Attention operators here want [B, S, H·D], models hand over [B, H, S, D]: the lowering puts a Transpose and a Reshape
between, and these rules take away both with those of the model.  What stays is what per-head norms need.
"""

from __future__ import annotations

import onnx_ir as ir

from .graph import PLACEHOLDER, Dim, Editor, array, dims, integers, made_by


def cancel(editor: Editor) -> None:
    """Apply all rules until none applies, then make shapes constant."""
    while any([_sink_transposes(editor), _cancel_transposes(editor), _merge_reshapes(editor)]):
        editor.sweep()
    _constant_shapes(editor)
    editor.sweep()


def reshape(editor: Editor, before: ir.Node, value: ir.Value, shape: tuple[Dim, ...]) -> ir.Value:
    """Add a Reshape to a shape that can be written as a constant."""
    target = constant_shape(dims(value), shape)
    if target is None:
        raise AssertionError(f"no constant reshapes {dims(value)} to {shape}")
    (output,) = editor.insert(before, "Reshape", [value, editor.constant(target)], [shape])
    return output


def swap_heads(editor: Editor, before: ir.Node, value: ir.Value) -> ir.Value:
    """Add a Transpose between [B, H, S, D] and [B, S, H, D]."""
    a, b, c, d = dims(value) or ()
    (output,) = editor.insert(before, "Transpose", [value], [(a, c, b, d)], {"perm": [0, 2, 1, 3]})
    return output


def heads_last(editor: Editor, before: ir.Node, value: ir.Value) -> ir.Value:
    """[B, H, S, D] as [B, S, H·D]."""
    swapped = swap_heads(editor, before, value)
    batch, length, heads, width = dims(swapped) or ()
    return reshape(editor, before, swapped, (batch, length, int(heads) * int(width)))


def heads_first(editor: Editor, before: ir.Node, value: ir.Value, heads: int, width: int) -> ir.Value:
    """[B, S, H·D] as [B, H, S, D]."""
    batch, length, _ = dims(value) or ()
    return swap_heads(editor, before, reshape(editor, before, value, (batch, length, heads, width)))


def constant_shape(before: tuple[Dim, ...] | None, after: tuple[Dim, ...]) -> list[int] | None:
    """Target of a Reshape as numbers: 0 keeps the axis of the same position, one -1 is inferred; None: impossible."""
    target: list[int] = []
    for position, dim in enumerate(after):
        if isinstance(dim, int):
            target.append(dim)
        elif before is not None and position < len(before) and before[position] == dim:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 else None


def _sink_transposes(editor: Editor) -> bool:
    changed = False
    for norm in editor.nodes("rms_norm", PLACEHOLDER):
        transpose = made_by(norm.inputs[0], "Transpose")
        if transpose is None or integers(transpose, "perm")[-1] != len(integers(transpose, "perm")) - 1:
            continue
        inner, perm = transpose.inputs[0], integers(transpose, "perm")
        (normed,) = editor.insert(
            norm, "rms_norm", [inner, norm.inputs[1]], [dims(inner)], dict(norm.attributes), PLACEHOLDER
        )
        (output,) = editor.insert(norm, "Transpose", [normed], [dims(norm.outputs[0])], {"perm": list(perm)})
        editor.replace(norm.outputs[0], output)
        editor.remove(norm)
        changed = True
    return changed


def _cancel_transposes(editor: Editor) -> bool:
    changed = False
    for second in editor.nodes("Transpose"):
        first = made_by(second.inputs[0], "Transpose")
        if first is None:
            continue
        inner, outer = integers(first, "perm"), integers(second, "perm")
        if [inner[axis] for axis in outer] == list(range(len(inner))):
            editor.replace(second.outputs[0], first.inputs[0])
            editor.remove(second)
            editor.log.fusions["transposes canceled"] += 1
            changed = True
    return changed


def _merge_reshapes(editor: Editor) -> bool:
    changed = False
    for last in editor.nodes("Reshape"):
        source, shape = last.inputs[0], dims(last.outputs[0])
        if shape is None or source.const_value is not None:
            continue
        first = made_by(source, "Reshape")
        if dims(source) == shape:
            editor.replace(last.outputs[0], source)
            editor.remove(last)
        elif first is not None and constant_shape(dims(first.inputs[0]), shape) is not None:
            last.replace_input_with(0, first.inputs[0])
            last.replace_input_with(1, editor.constant(constant_shape(dims(first.inputs[0]), shape) or []))
            last.attributes.pop("allowzero", None)
        else:
            continue
        editor.log.fusions["reshapes merged"] += 1
        changed = True
    return changed


def _constant_shapes(editor: Editor) -> None:
    for node in editor.nodes("Reshape"):
        shape = dims(node.outputs[0])
        target = None if shape is None else constant_shape(dims(node.inputs[0]), shape)
        if target is not None and (array(node.inputs[1]) is None or "allowzero" in node.attributes):
            node.replace_input_with(1, editor.constant(target))
            node.attributes.pop("allowzero", None)
