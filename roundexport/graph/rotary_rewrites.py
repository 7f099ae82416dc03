"""Rotary embeddings in a traced program, brought to the form in which attention operators take them.

    cat(rope(x[…, :R]), x[…, R:])      ->   rope(x), which turns the first R of each head and passes the rest
    rope(x) · s                        ->   rope(x · s), s one number for each head: it scales both of a pair
    rms(rope(x), ones)                 ->   rope(rms(x, ones)): a turn keeps the length of a head
    transpose(transpose(x))            ->   x

All are the same numbers, but for the order of roundings, with fewer operators or with the turn last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .placeholders import RMS_NORM
from .rotary import ROPE

_ATEN, _END = torch.ops.aten, torch.iinfo(torch.long).max


def simplify_rotary(program: torch.export.ExportedProgram) -> None:
    """Apply the rules, in place; what nobody reads any more goes as well.

    Args:
        program: a captured program.
    """
    graph = program.graph
    for node in list(graph.nodes):
        if node.target is ROPE:
            _widen(node)
    _cancel(graph)
    for node in list(graph.nodes):
        if node.target in (_ATEN.mul.Tensor, RMS_NORM):
            _turn_last(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _cancel(graph: torch.fx.Graph) -> None:
    for node in list(graph.nodes):
        before = _swapped(node)
        source = None if before is None else _swapped(before)
        if source is not None:
            node.replace_all_uses_with(source)
    graph.eliminate_dead_code()


def _turn_last(node: Node) -> None:
    """Of a rope and what treats both numbers of every pair alike, the latter first."""
    first, second, *rest = arguments(node)
    kind: Any = node.target
    rope, other = (first, second) if isinstance(first, Node) and first.target is ROPE else (second, first)
    if not isinstance(rope, Node) or rope.target is not ROPE or len(rope.users) != 1 or not isinstance(other, Node):
        return
    if node.target is RMS_NORM and other.target is not _ATEN.ones.default:
        return
    if node.target is not RMS_NORM and (other.meta["val"].ndim != 4 or other.meta["val"].shape[-1] != 1):
        return
    x, *angles = arguments(rope)
    with node.graph.inserting_before(node):
        before = node.graph.call_function(kind, (x, other, *rest))
        turned = node.graph.call_function(ROPE, (before, *angles))
    before.meta["val"] = turned.meta["val"] = x.meta["val"]
    node.replace_all_uses_with(turned)


def _widen(rope: Node) -> None:
    """With heads on axis 1, or on axis 2 between two transposes."""
    x, *angles = arguments(rope)
    front, last = _swapped(x) or x, next(iter(rope.users), rope)
    last = last if _swapped(last) is rope and front is not x else rope
    whole = next(iter(last.users), rope)
    if len(rope.users) != 1 or len(last.users) != 1 or whole.target is not _ATEN.cat.default:
        return
    (parts, *axis), width = arguments(whole), int(rope.meta["val"].shape[-1])
    if len(parts) != 2 or parts[0] is not last or (*axis, 0)[0] not in (-1, 3):
        return
    cuts = [_cut(part) for part in (front, parts[1])]
    if cuts[0] is None or cuts[1] is None or cuts[0][0] is not cuts[1][0]:
        return
    source, start, stop = cuts[0]
    if (start, stop, cuts[1][1]) != (0, width, width) or cuts[1][2] < int(source.meta["val"].shape[-1]):
        return
    with whole.graph.inserting_before(whole):
        if front is not x:
            source = _swap(source)
        turned = whole.graph.call_function(ROPE, (source, *angles))
        turned.meta["val"] = source.meta["val"]
        whole.replace_all_uses_with(turned if front is x else _swap(turned))


def arguments(node: Node) -> tuple[Any, ...]:
    """What a node is called with; torch's own type of it is a union of everything."""
    return node.args


def _swap(x: Node) -> Node:
    """A transpose of axes 1 and 2."""
    node = x.graph.call_function(_ATEN.transpose.int, (x, 1, 2))
    node.meta["val"] = x.meta["val"].transpose(1, 2)
    return node


def _swapped(node: Any) -> Node | None:
    """What a transpose of axes 1 and 2 of four is a transpose of; None for anything else."""
    if not isinstance(node, Node) or node.target not in (_ATEN.transpose.int, _ATEN.permute.default):
        return None
    source, *how = arguments(node)
    if not isinstance(source, Node) or len(source.meta["val"].shape) != 4:
        return None
    axes = sorted(axis % 4 for axis in how) if len(how) == 2 else [axis % 4 for axis in how[0]]
    return source if axes in ([1, 2], [0, 2, 1, 3]) else None


def _cut(node: Any) -> tuple[Node, int, int] | None:
    """(source, start, stop) of a slice of the last axis, seen through slices that keep everything."""
    found = _slice(node)
    if found is None:
        return None
    source, axis, start, stop = found
    while (inner := _slice(source)) is not None and inner[2:] == (0, _END):
        source = inner[0]
    return (source, start, stop) if axis == len(source.meta["val"].shape) - 1 else None


def _slice(node: Any) -> tuple[Node, int, int, int] | None:
    """(source, axis, start, stop) of a slice with step 1 and known ends."""
    if not isinstance(node, Node) or node.target is not _ATEN.slice.Tensor:
        return None
    given = arguments(node)
    source, axis, start, stop, step = given + (0, None, None, 1)[len(given) - 1 :]
    start, stop = start or 0, _END if stop is None else stop
    if step != 1 or not isinstance(start, int) or not isinstance(stop, int):
        return None
    return source, axis % len(source.meta["val"].shape), start, stop
