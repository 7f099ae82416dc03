"""Clearing up after the exporter: constants folded, equal computations merged, operators that do nothing removed.

Slice that keeps everything              dropped        (transformers slices logits to "all positions")
Mul by 1.0                               dropped        (rotary attention scaling)
Slices that cut the last axis to pieces  one Split      (Phi-3 cuts q, k and v out of one linear)
Reshape + Slice + Squeeze of axis 2      Split + Reshape of the pieces (ModernBERT unbinds q, k and v)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript import optimizer

from .graph import Dim, Editor, array, dims, made_by

_MAX = np.iinfo(np.int64).max


def tidy(editor: Editor) -> None:
    """Fold and drop whatever can be without looking at weights."""
    optimizer.fold_constants(editor.model)
    passes.IdentityEliminationPass()(editor.model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(editor.model)
    passes.CommonSubexpressionEliminationPass()(editor.model)
    _drop_empty_slices(editor)
    _drop_times_one(editor)
    editor.sweep()
    _split_unbound(editor)
    _split_slices(editor)
    editor.sweep()


def finish(editor: Editor) -> None:
    """Last clearing: equal computations merged, unused opsets dropped, nodes in order."""
    editor.sweep()
    passes.CommonSubexpressionEliminationPass()(editor.model)
    editor.sweep()
    passes.TopologicalSortPass()(editor.model)
    passes.RemoveUnusedOpsetsPass()(editor.model)


def _drop_empty_slices(editor: Editor) -> None:
    for node in editor.nodes("Slice"):
        starts, ends, _, steps = _slice_parameters(node)
        if starts is not None and not any(starts) and all(end == _MAX for end in ends) and set(steps) <= {1}:
            _bypass(editor, node)


def _drop_times_one(editor: Editor) -> None:
    for node in editor.nodes("Mul"):
        factor = array(node.inputs[1])
        if factor is not None and factor.size == 1 and factor.item() == 1.0 and factor.ndim == 0:
            _bypass(editor, node)


def _bypass(editor: Editor, node: ir.Node) -> None:
    editor.replace(node.outputs[0], node.inputs[0])
    editor.remove(node)


def _split_slices(editor: Editor) -> None:
    """Slices of one value that cut its last axis into consecutive pieces become one Split."""
    for source in {id(node.inputs[0]): node.inputs[0] for node in editor.nodes("Slice")}.values():
        shape = dims(source)
        if shape is None or not isinstance(shape[-1], int):
            continue
        cuts = [(_last_axis_cut(user, len(shape), shape[-1]), user) for user in source.consumers()]
        pieces = sorted(((cut, user) for cut, user in cuts if cut is not None), key=lambda piece: piece[0])
        ends = [0, *(stop for (_, stop), _ in pieces)]
        if len(pieces) < 2 or [start for (start, _), _ in pieces] != ends[:-1] or ends[-1] != shape[-1]:
            continue
        sizes = [stop - start for (start, stop), _ in pieces]
        earliest = next(node for node in editor.graph if node in {user for _, user in pieces})
        parts = split(editor, earliest, source, sizes)
        for part, (_, user) in zip(parts, pieces, strict=True):
            editor.replace(user.outputs[0], part)
            editor.remove(user)
        editor.log.fusions["slices to split"] += 1


def split(editor: Editor, before: ir.Node, value: ir.Value, sizes: list[int]) -> list[ir.Value]:
    """Cut the last axis of a value into pieces of these sizes."""
    leading = (dims(value) or ())[:-1]
    shapes: list[tuple[Dim, ...]] = [(*leading, size) for size in sizes]
    return editor.insert(before, "Split", [value, editor.constant(sizes)], shapes, {"axis": -1})


def _last_axis_cut(node: ir.Node, rank: int, width: int) -> tuple[int, int] | None:
    """(start, stop) of a Slice with step 1 over the last axis only."""
    if node.op_type != "Slice":
        return None
    starts, ends, axes, steps = _slice_parameters(node)
    if starts is None or len(starts) != 1 or axes[0] % rank != rank - 1 or steps[0] != 1 or starts[0] < 0:
        return None
    return int(starts[0]), int(min(ends[0], width))


def _slice_parameters(node: ir.Node) -> tuple[list[int] | None, list[int], list[int], list[int]]:
    """Starts, ends, axes and steps of a Slice with constant parameters; starts is None for another."""
    given = [array(value) for value in node.inputs[1:]]
    if len(given) < 3 or any(values is None for values in given):
        return None, [], [], []
    starts, ends, axes = ([int(v) for v in values] for values in given[:3] if values is not None)
    steps = [1] * len(starts) if len(given) < 4 or given[3] is None else [int(v) for v in given[3]]
    return starts, ends, axes, steps


def _split_unbound(editor: Editor) -> None:
    """[B, S, n·M] viewed as [B, S, n, H, D] and unbound along axis 2 is a Split into n pieces of M = H·D."""
    for view in editor.nodes("Reshape"):
        flat, shape = dims(view.inputs[0]), dims(view.outputs[0])
        if flat is None or shape is None or len(flat) != 3 or len(shape) != 5 or flat[:2] != shape[:2]:
            continue
        if not all(isinstance(dim, int) for dim in (flat[2], *shape[2:])):
            continue
        pieces = [_unbound_piece(user) for user in view.outputs[0].consumers()]
        if sorted(piece[0] for piece in pieces if piece) != list(range(int(shape[2]))) or None in pieces:
            continue
        parts = split(editor, view, view.inputs[0], [int(flat[2]) // int(shape[2])] * int(shape[2]))
        for index, squeeze in (piece for piece in pieces if piece):
            target = editor.constant([0, 0, int(shape[3]), int(shape[4])])
            (heads,) = editor.insert(view, "Reshape", [parts[index], target], [(*shape[:2], *shape[3:])])
            editor.replace(squeeze.outputs[0], heads)
        editor.log.fusions["unbind to split"] += 1
    editor.sweep()


def _unbound_piece(node: ir.Node) -> tuple[int, ir.Node] | None:
    """(index, Squeeze) of a Slice [index, index+1) over axis 2 of a 5-D value whose only reader squeezes that axis."""
    if node.op_type != "Slice" or len(node.outputs[0].consumers()) != 1:
        return None
    starts, ends, axes, steps = _slice_parameters(node)
    squeeze = node.outputs[0].consumers()[0]
    if starts is None or len(starts) != 1 or ends[0] != starts[0] + 1 or axes[0] % 5 != 2 or steps[0] != 1:
        return None
    return (starts[0], squeeze) if made_by(squeeze.outputs[0], "Squeeze") else None
