"""Names of layers as places: which stack, which block, which kind of layer.

    model.layers.3.self_attn.q_proj    stack "model.layers", block 3, kind "self_attn.q_proj"
    model.layers.3.mlp.experts.7.up    kind "mlp.experts.*.up": further numbers are alike
    model.embed_tokens                 outside the blocks

In: names.  Out: a grid per stack, blocks across and kinds down, each cell with the layers in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_BLOCK = re.compile(r"(?P<stack>.+?)\.(?P<block>\d+)\.(?P<kind>.+)")


@dataclass(frozen=True)
class Place:
    """Where a layer is; ``block`` is None outside the blocks."""

    stack: str
    block: int | None
    kind: str

    @classmethod
    def of(cls, name: str) -> Place:
        """From a layer's name."""
        found = _BLOCK.fullmatch(name)
        if found is None:
            return cls("", None, name)
        kind = ".".join("*" if part.isdigit() else part for part in found["kind"].split("."))
        return cls(found["stack"], int(found["block"]), kind)


@dataclass(frozen=True)
class Grid:
    """The layers of one stack.

    Args:
        stack: its name; empty for layers outside the blocks.
        blocks: their numbers, in order.
        kinds: in the order in which they first come.
        cells: (kind, block) -> names.
    """

    stack: str
    blocks: tuple[int, ...]
    kinds: tuple[str, ...]
    cells: dict[tuple[str, int], tuple[str, ...]] = field(default_factory=dict)


def grids(names: Iterable[str]) -> tuple[list[Grid], list[str]]:
    """Layers by stack, and the names of those outside the blocks.

    Args:
        names: of layers, in the model's order where it is known.
    """
    stacks: dict[str, dict[tuple[str, int], list[str]]] = {}
    outside = []
    for name in names:
        place = Place.of(name)
        if place.block is None:
            outside.append(name)
        else:
            stacks.setdefault(place.stack, {}).setdefault((place.kind, place.block), []).append(name)
    found = [
        Grid(
            stack,
            tuple(sorted({block for _, block in cells})),
            tuple(dict.fromkeys(kind for kind, _ in cells)),
            {key: tuple(inside) for key, inside in cells.items()},
        )
        for stack, cells in stacks.items()
    ]
    return found, outside


def short_kind(kind: str) -> str:
    """The part of a kind's name that tells it from others: ``q_proj`` of ``self_attn.q_proj``."""
    parts = kind.split(".")
    return parts[-1] if parts[-1] not in ("dense", "linear", "weight", "0", "*") else ".".join(parts[-2:])
