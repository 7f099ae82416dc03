"""Pictures of a model's layers: their bits, block by block, and what each lost before and after tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .layers import Grid, grids, short_kind
from .numbers import short
from .records import PackageRecord
from .svg import CHARACTER, Axis, Drawing, fitting

_FLOAT = 16
TILE = 156.0
"""Width of the small drawings."""


def bits_of(record: PackageRecord) -> dict[str, int]:
    """Bits by layer; layers kept float count as 16."""
    found = {name: layer["bits"] for name, layer in record.manifest.layers.items()}
    kept = {name: _FLOAT for name, _ in record.manifest.kept_float}
    return {name: {**kept, **found}[name] for name in record.layer_names if name in found or name in kept}


def bits_picture(bits: Mapping[str, int], width: float) -> Drawing:
    """A column per block, a row per kind of layer, a shade per number of bits.

    Args:
        bits: by layer.
        width: px.
    """
    stacks, outside = grids(bits)
    kinds = [short_kind(kind) for grid in stacks for kind in grid.kinds]
    label = min(0.36 * width, CHARACTER * max(map(len, [*kinds, *map(short_kind, outside)]), default=0) + 8)
    row = 20.0
    rows = sum(len(grid.kinds) + 2 for grid in stacks) + len(outside)
    drawing = Drawing(width, rows * row + 4, f"Bits per layer: {summary(bits)}")
    y = 2.0
    for grid in stacks:
        y = _stack(drawing, grid, bits, label, y, row)
    for name in outside:
        drawing.text(label - 6, y + 14, fitting(short_kind(name), label - 6), "", "end")
        drawing.box(label, y + 1, width - label, row - 2, f"b{bits[name]}", f"{name}: {told(bits[name])}")
        drawing.text(label + 8, y + 14, told(bits[name]), f"on{bits[name]}")
        y += row
    return drawing


def summary(bits: Mapping[str, int]) -> str:
    """How many layers have how many bits."""
    counts = {count: sum(1 for value in bits.values() if value == count) for count in sorted(set(bits.values()))}
    return ", ".join(f"{told(count)} ×{layers}" for count, layers in counts.items())


def told(bits: int) -> str:
    """Bits in words."""
    return "float" if bits == _FLOAT else f"{bits} bits"


def _stack(drawing: Drawing, grid: Grid, bits: Mapping[str, int], label: float, y: float, row: float) -> float:
    cell = (drawing.width - label) / len(grid.blocks)
    gap = 1.0 if cell > 4 else 0.0
    for kind in grid.kinds:
        drawing.text(label - 6, y + 14, fitting(short_kind(kind), label - 6), "", "end")
        for column, block in enumerate(grid.blocks):
            names = grid.cells.get((kind, block), ())
            if not names:
                continue
            least, most = min(bits[name] for name in names), max(bits[name] for name in names)
            x = label + column * cell
            drawing.box(x, y + 1, cell - gap, row - 2, f"b{least}")
            if cell >= 15 and least != _FLOAT:
                words = str(least) if least == most else f"{least}–{most}"
                drawing.text(x + (cell - gap) / 2, y + 14, words, f"on{least}", "middle")
        y += row
    every = max(1, -(-len(grid.blocks) // int((drawing.width - label) / 34)))
    for column, block in enumerate(grid.blocks):
        if column % every == 0:
            drawing.text(label + (column + 0.5) * cell, y + 12, str(block), "soft", "middle")
    drawing.text(label - 6, y + 12, "block", "soft", "end")
    return y + 1.6 * row


@dataclass(frozen=True)
class Losses:
    """Losses before and after of the layers of one kind, by block."""

    name: str
    before: dict[int, float]
    after: dict[int, float]

    @property
    def gain(self) -> float | None:
        """Median of after over before."""
        ratios = sorted(self.after[b] / self.before[b] for b in self.after if self.before.get(b, 0.0) > 0)
        return ratios[len(ratios) // 2] if ratios else None


def losses_of(record: PackageRecord) -> list[Losses]:
    """What is recorded, by kind of layer; one entry for all kinds where the method measures whole blocks."""
    if record.artifact is None:
        return []
    known = {
        layer.info.name: (layer.loss_before, layer.loss_after)
        for layer in record.artifact.layers
        if layer.loss_before is not None and layer.loss_after is not None
    }
    stacks, _ = grids(known)
    found = []
    for grid in stacks:
        of_blocks = [
            {known[n] for (_, b), names in grid.cells.items() if b == block for n in names} for block in grid.blocks
        ]
        whole = len(grid.kinds) > 1 and all(len(pairs) == 1 for pairs in of_blocks)
        prefix = f"{grid.stack} " if len(stacks) > 1 else ""
        for kind in grid.kinds[:1] if whole else grid.kinds:
            pairs = {
                block: [known[name] for name in grid.cells[kind, block]]
                for block in grid.blocks
                if (kind, block) in grid.cells
            }
            before = {b: sum(float(p[0] or 0.0) for p in ps) / len(ps) for b, ps in pairs.items()}
            after = {b: sum(float(p[1] or 0.0) for p in ps) / len(ps) for b, ps in pairs.items()}
            found.append(Losses(prefix + ("whole block" if whole else kind), before, after))
    return found


def loss_pictures(losses: list[Losses]) -> list[Drawing]:
    """A small drawing per kind: blocks across, loss upward on a logarithmic axis that all share."""
    values = [v for entry in losses for v in (*entry.before.values(), *entry.after.values())]
    return [_loss_picture(entry, values) for entry in losses]


def _loss_picture(entry: Losses, values: list[float]) -> Drawing:
    width, height, left, top, bottom = TILE, 132.0, 44.0, 22.0, 18.0
    gain = entry.gain
    drawing = Drawing(
        width, height,
        f"{entry.name}: loss by block, before and after tuning"
        + ("" if gain is None else f"; the median block keeps {gain:.2f} of it"),
    )  # fmt: skip
    across = Axis(min(entry.before), max(*entry.before, min(entry.before) + 1), left + 4, width - 4)
    upward = Axis.over(values, height - bottom, top, log=True)
    drawing.text(0, 13, fitting(short_kind(entry.name), width - 50), "name")
    if gain is not None:
        drawing.text(width, 13, f"×{gain:.2f}", "soft", "end")
    drawing.side(upward, left, width, 4)
    for style, series in (("before", entry.before), ("after", entry.after)):
        points = [(across.at(block), upward.at(value)) for block, value in sorted(series.items())]
        if len(points) == 1:
            drawing.dot(*points[0], 3, f"{style}-dot")
        else:
            drawing.line(points, style)
    for block, anchor in ((min(entry.before), "start"), (max(entry.before), "end")):
        drawing.text(across.at(block), height - 4, str(block), "soft", anchor)
    return drawing


def losses_told(losses: list[Losses]) -> list[tuple[str, str, str, str]]:
    """A row per kind: name, median before, median after, ratio."""

    def middle(series: Mapping[int, float]) -> str:
        values = sorted(series.values())
        return short(values[len(values) // 2] if values else None, 3)

    return [
        (entry.name, middle(entry.before), middle(entry.after), "–" if entry.gain is None else f"{entry.gain:.2f}")
        for entry in losses
    ]
