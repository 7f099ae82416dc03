"""Which constants of a graph hold which tuned layers, by value.

A constant is read as [N, K] by a reader, turned or not.  A layer [n, K] is in it where n rows in a row equal the
layer's float values, rounded to the constant's own type (float32, float16, bfloat16): all of it, or the rows of one
that an exporter packed (q, k and v below each other).  Column 0 is looked at first, everything afterwards.

A constant is replaced for a reader only where tuned layers fill it from the first row to the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import UnsupportedError
from roundexport.quant.spec import LayerKind

from .layers import Layer, TunedLayers

_PART = 1 << 22  # values compared at a time


@dataclass(frozen=True, eq=False)
class Reader:
    """A node that reads a constant.

    Args:
        kind: as the weight of a linear or the table of an embedding; None: in a way that cannot be replaced.
        turned: the weight [N, K] is the constant's transpose.
        label: operator and name, for messages.
        node: the graph's own node.
        edge: the graph's own note of where the constant's value enters the path to the node.
    """

    kind: LayerKind | None
    turned: bool
    label: str
    node: Any
    edge: Any = None


@dataclass(frozen=True, eq=False)
class FloatConstant:
    """A matrix of floats in a graph.

    Args:
        name: its name there.
        values: float32 or float16 [R, C], or bits of bfloat16 as uint16; mapped, not loaded.
        readers: who reads it.
        handle: the graph's own object.
    """

    name: str
    values: NDArray[Any]
    readers: tuple[Reader, ...]
    handle: Any = None

    def view(self, turned: bool) -> NDArray[Any]:
        """The constant as [N, K]."""
        return self.values.T if turned else self.values


@dataclass(frozen=True, eq=False)
class Replacement:
    """A reader that gets integers: those of the layers, one below the other."""

    constant: FloatConstant
    reader: Reader
    layers: tuple[Layer, ...]


@dataclass
class Matches:
    """What was found.

    Args:
        replacements: in the order of the constants.
        missing: layer -> why it is not in the graph.
        twins: layer -> another one with the same floats and the same integers, which stands for both.
    """

    replacements: list[Replacement] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    twins: dict[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, Layer]:
        """The layers that are in the graph, by name, each once."""
        return {layer.name: layer for replacement in self.replacements for layer in replacement.layers}


_Key = tuple[int, bool, LayerKind]  # of a constant, as it is read


def match(constants: Sequence[FloatConstant], tuned: TunedLayers) -> Matches:
    """Find every tuned layer.

    Args:
        constants: those of the graph.
        tuned: the layers.

    Raises:
        UnsupportedError: two layers have the same float values and other integers, so a graph cannot tell them apart.
    """
    places: dict[_Key, dict[int, Layer]] = {}
    twins: dict[str, str] = {}
    heads: dict[tuple[int, bool], NDArray[Any]] = {}
    for layer in tuned.all:
        weight = tuned.weight(layer)
        for number, constant in enumerate(constants):
            for turned in sorted({reader.turned for reader in constant.readers}):
                kinds = {r.kind for r in constant.readers if r.turned == turned and r.kind in layer.roles}
                view = constant.view(turned)
                if kinds and view.shape[1] == weight.shape[1] and view.shape[0] >= weight.shape[0]:
                    head = heads.setdefault((number, turned), np.array(view[:, 0]))
                    for start in _rows(view, head, weight):
                        for kind in kinds:
                            if kind is not None:
                                there = places.setdefault((number, turned, kind), {}).setdefault(start, layer)
                                if there is not layer:
                                    twins[layer.name] = _twin(there, layer, tuned)
    return _plan(constants, places, tuned.all, twins)


def equal_values(stored: NDArray[Any], values: NDArray[np.float32]) -> bool:
    """Whether a constant holds these values, rounded to its type; a part at a time."""
    if stored.shape != values.shape:
        return False
    step = max(1, _PART // max(1, int(np.prod(values.shape[1:]))))
    parts = (slice(start, start + step) for start in range(0, len(values), step))
    return all(np.array_equal(np.asarray(stored[part]), as_stored(values[part], stored.dtype)) for part in parts)


def as_stored(values: NDArray[np.float32], dtype: Any) -> NDArray[Any]:
    """Values rounded to the nearest number of a constant's type; bfloat16 as its bits."""
    if dtype == np.uint16:
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def _rows(view: NDArray[Any], head: NDArray[Any], weight: NDArray[np.float32]) -> Iterator[int]:
    """Rows of the view from which on it equals the weight."""
    count = len(weight)
    first = as_stored(weight[:1], view.dtype)[0]
    column = as_stored(weight[:, :1], view.dtype)[:, 0]
    for start in np.flatnonzero(head[: len(head) - count + 1] == first[0]):
        if not np.array_equal(head[start : start + count], column) or not np.array_equal(view[start], first):
            continue
        if equal_values(view[start : start + count], weight):
            yield int(start)


def _twin(first: Layer, second: Layer, tuned: TunedLayers) -> str:
    if not tuned.integers(first).equals(tuned.integers(second)):
        raise UnsupportedError(
            f"{first.name} and {second.name} have the same float values and other integers, so the graph does not say "
            "which is which"
        )
    return first.name


def _plan(
    constants: Sequence[FloatConstant],
    places: Mapping[_Key, dict[int, Layer]],
    layers: list[Layer],
    twins: dict[str, str],
) -> Matches:
    found = Matches(twins=twins)
    for number, constant in enumerate(constants):
        for reader in constant.readers:
            rows = places.get((number, reader.turned, reader.kind)) if reader.kind is not None else None
            if not rows:
                continue
            pieces = [rows[start] for start in sorted(rows)]
            gap = _gap(rows, len(constant.view(reader.turned)))
            if gap is None:
                found.replacements.append(Replacement(constant, reader, tuple(pieces)))
            else:
                for piece in pieces:
                    found.missing[piece.name] = f"it is a part of {constant.name}, {gap}"
    done = found.layers
    for layer in layers:
        if layer.name in done or twins.get(layer.name) in done:
            found.missing.pop(layer.name, None)
        else:
            why = "no matrix of the graph that is read as such a weight holds its float values"
            found.missing.setdefault(layer.name, why)
    found.twins = {name: first for name, first in twins.items() if name not in done}
    return found


def _gap(rows: Mapping[int, Layer], size: int) -> str | None:
    """Which rows no layer fills, or None."""
    end = 0
    for start in sorted(rows):
        if start != end:
            return (
                f"of which rows {end} to {start - 1} belong to no tuned layer" if start > end else "where two overlap"
            )
        end = start + rows[start].info.out_features
    return None if end == size else f"of which rows {end} to {size - 1} belong to no tuned layer"
