"""Which rotary embeddings may leave the numbers of a head in another order: those that only products q·k read.

A permutation of a head's numbers changes no product of a query and a key if both are permuted alike.  So where the
results of two ropes reach nothing but the queries and the keys of attention, by operators that treat all numbers of a
head the same way, a target may turn a head whose pairs lie side by side as one whose pairs lie in halves.

    treat them alike     transposes, copies, repeated heads, a product with one number per head, a mean over the head,
                         a concatenation along the head with what is not turned
    do not               a norm with a weight for each number; anything else
"""

from __future__ import annotations

import torch
from torch.fx import Node

from .placeholders import ATTENTION
from .rotary import ROPE
from .rotary_rewrites import arguments

_ATEN = torch.ops.aten
_ALIKE = {
    _ATEN.transpose.int, _ATEN.permute.default, _ATEN.expand.default, _ATEN.clone.default, _ATEN.contiguous.default,
    _ATEN.cat.default, _ATEN.to.dtype, _ATEN._to_copy.default, _ATEN.pow.Tensor_Scalar,
}  # fmt: skip


def orderless(program: torch.export.ExportedProgram) -> frozenset[int]:
    """Indices of rope placeholders whose results may be in another order.

    Args:
        program: a captured program.
    """
    ropes = [node for node in program.graph.nodes if node.target is ROPE]
    reached = {rope: _reached(rope) for rope in ropes}
    free = {rope for rope, found in reached.items() if found is not None}
    while free:
        sides = {
            (attention, side): {rope for rope in ropes if (attention, side) in (reached[rope] or ())}
            for rope in ropes
            for attention, _ in reached[rope] or ()
            for side in (0, 1)
        }
        bound = set()
        for attention, _ in sides:
            both = sides[attention, 0], sides[attention, 1]
            kinds = [{_kind(rope) for rope in side} for side in both]
            if kinds[0] != kinds[1] or len(kinds[0]) != 1 or not both[0] | both[1] <= free:
                bound |= both[0] | both[1]
        if not bound & free:
            break
        free -= bound
    return frozenset(int(arguments(rope)[3]) for rope in free)


def _kind(rope: Node) -> tuple[int, int, bool]:
    """Width of the head, half the width of what is turned, and where the pairs lie."""
    x, cos, *_, interleaved = arguments(rope)
    return int(x.meta["val"].shape[-1]), int(cos.meta["val"].shape[-1]), bool(interleaved)


def _reached(rope: Node) -> frozenset[tuple[Node, int]] | None:
    """(attention, 0 as queries or 1 as keys) that read a rope; None where anything else reads its numbers."""
    found: set[tuple[Node, int]] = set()
    open_, seen = [rope], {rope}
    while open_:
        node = open_.pop()
        for user in node.users:
            if user.target is ATTENTION:
                places = [place for place, given in enumerate(arguments(user)) if given is node]
                if any(place > 1 for place in places):
                    return None
                found |= {(user, place) for place in places}
            elif user.target is _ATEN.sym_size.int or _is_mean(user):
                continue
            elif user.target not in _ALIKE and not _is_scaling(user, node):
                return None
            elif user not in seen:
                seen.add(user)
                open_.append(user)
    return frozenset(found)


def _is_mean(user: Node) -> bool:
    """Whether it is a mean over the head."""
    return user.target is _ATEN.mean.dim and list(arguments(user)[1]) in ([-1], [3])


def _is_scaling(user: Node, node: Node) -> bool:
    """Whether it is a product with one number per head, or with a number, or a norm without a weight."""
    if user.target not in (_ATEN.mul.Tensor, _ATEN.div.Tensor) or (
        arguments(user)[0] is not node and arguments(user)[1] is not node
    ):
        return False
    other = arguments(user)[1] if arguments(user)[0] is node else arguments(user)[0]
    if not isinstance(other, Node):
        return True
    shape = other.meta["val"].shape if isinstance(other.meta.get("val"), torch.Tensor) else ()
    return not shape or shape[-1] == 1
