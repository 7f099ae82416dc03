"""Writing into parts of a tensor, as operators that give a new one.

    empty = new_empty(…); empty[..., :n].copy_(a); empty[..., n:].copy_(b)      ──▶  cat([a, b], -1)
    x[..., i::3].copy_(b)                                                       ──▶  slice_scatter(x, b, …)

A program that writes is decomposed by torch as a whole, twice over (decomposition.py), and a runtime copies a tensor
for every part that is written; joined parts are one operator.  Every name that stands for the same memory, and is read
after a write, is taken anew from what the write gave.

Limits: parts are slices, and single places of an axis; what is written to is made by the program itself, and is not
seen under a name of another kind (a view of other sizes, a transposition) before the write.  The rest stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

_ATEN = torch.ops.aten
_SCATTER: dict[Any, Any] = {
    _ATEN.slice.Tensor: _ATEN.slice_scatter.default,
    _ATEN.select.int: _ATEN.select_scatter.default,
}
_GIVES: dict[Any, Any] = {  # what writes -> what gives the same
    _ATEN.copy_.default: _ATEN.copy.default,
    _ATEN.fill_.Scalar: _ATEN.fill.Scalar,
    _ATEN.fill_.Tensor: _ATEN.fill.Tensor,
}
_EMPTY = (_ATEN.new_empty.default, _ATEN.empty.memory_format, _ATEN.empty_like.default)


def without_writes(program: torch.export.ExportedProgram) -> None:
    """Replace writes into parts of tensors, in place; those that are more than that stay."""
    graph = program.graph
    for write in [node for node in graph.nodes if node.target in _GIVES]:
        chain = _chain(write.args[0])
        if chain and not write.users and _is_plain(chain[0], write):
            _replace(graph, write, chain)
    graph.eliminate_dead_code()
    for made in [node for target in _EMPTY for node in graph.find_nodes(op="call_function", target=target)]:
        _join(graph, made)
    graph.eliminate_dead_code()
    graph.lint()


def _chain(part: Any) -> list[fx.Node]:
    """What is written to and the views that lead to the part, in order; empty where they are of other kinds."""
    found = [part]
    while isinstance(found[0], fx.Node) and found[0].target in _SCATTER:
        found.insert(0, found[0].args[0])
    root = found[0]
    fresh = isinstance(root, fx.Node) and root.op == "call_function" and not _is_view(root)
    return found if fresh and len(found) > 1 else []


def _is_view(node: fx.Node) -> bool:
    """Whether what a node gives may be memory of its inputs."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    schema = node.target._schema
    return any(one.alias_info is not None for one in (*schema.arguments, *schema.returns))


def _is_plain(root: fx.Node, write: fx.Node) -> bool:
    """Whether all names of the memory, made before the write and read after it, are slices and places."""
    order = {node: place for place, node in enumerate(write.graph.nodes)}
    return all(
        user.target in _SCATTER or user is write or not _is_view(user) or order[user] > order[write]
        for name in _names(root)
        for user in name.users
    )


def _names(root: fx.Node) -> Iterator[fx.Node]:
    """The tensor and every slice of it, and of those."""
    yield root
    for user in root.users:
        if user.target in _SCATTER and user.args[0] is root:
            yield from _names(user)


def _replace(graph: fx.Graph, write: fx.Node, chain: list[fx.Node]) -> None:
    order = {node: place for place, node in enumerate(graph.nodes)}
    names, value = list(_names(chain[0])), write.args[1]
    part = chain[-1]
    with graph.inserting_before(write):
        if write.target is not _ATEN.copy_.default or not _same_kind(part, value):
            value = _like(graph.call_function(_GIVES[write.target], (part, value)), part, write)
        for inner, whole in zip(reversed(chain), reversed(chain[:-1]), strict=False):
            if not _same_kind(whole, inner):  # of one that keeps everything
                scatter = graph.call_function(_SCATTER[inner.target], (whole, value, *inner.args[1:]))
                value = _like(scatter, whole, write)
        anew: dict[Any, Any] = {chain[0]: value}
        for name in names[1:]:
            if order[name] < order[write]:
                view: Any = name.target
                again = graph.call_function(view, (anew[name.args[0]], *name.args[1:]))
                anew[name] = _like(again, name, write)
    for name, new in anew.items():
        name.replace_all_uses_with(new, delete_user_cb=lambda user: order.get(user, -1) > order[write])
    graph.erase_node(write)


def _like(node: fx.Node, other: fx.Node, of: fx.Node) -> fx.Node:
    """A new node that gives what another one gave, in the place of a third one."""
    node.meta = {**of.meta, "val": other.meta["val"]}
    return node


def _same_kind(part: fx.Node, value: Any) -> bool:
    if not isinstance(value, fx.Node):
        return False
    one, other = part.meta["val"], value.meta["val"]
    return one.dtype == other.dtype and list(map(str, one.shape)) == list(map(str, other.shape))


def _join(graph: fx.Graph, empty: fx.Node) -> None:
    """One operator for an empty tensor that is filled part by part along its last axis, and is nothing in between."""
    axis, size = empty.meta["val"].ndim - 1, empty.meta["val"].shape[-1]
    parts, node, end = list[fx.Node](), empty, 0
    while isinstance(size, int) and end < size:
        scatter = next(iter(node.users), node)
        if len(node.users) != 1 or scatter.target is not _ATEN.slice_scatter.default or scatter.args[0] is not node:
            return
        given: list[Any] = list(scatter.args[1:])
        value, dim, start, stop, step = given + [None, 0, None, None, 1][len(given) :]
        if dim not in (axis, -1) or step != 1 or (start or 0) != end or not isinstance(value, fx.Node):
            return
        parts.append(value)
        end, node = size if stop is None else min(size, stop), scatter
    if parts:
        with graph.inserting_before(node):
            joined = _like(graph.call_function(_ATEN.cat.default, (parts, axis)), node, node)
        node.replace_all_uses_with(joined)
