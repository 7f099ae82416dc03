"""Inputs for a graph of which only names, types and shapes are known, to compare two graphs on.

    *input_ids     random tokens [B, S]                      past…           random [B, heads, P, D]
    attention_mask ones [B, P+S]                             position_ids    P … P+S−1
    cache_position the same, [S]                             beam_idx        0 … B−1
    other floats   random                                    other integers  zeros

An axis of a fixed size keeps it.  Graphs differ in what they take: some refuse several tokens behind a filled cache
for more than one row.  So there are sizes to try, the widest first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Feeds = dict[str, NDArray[Any]]
_SEED = 11


@dataclass(frozen=True)
class Port:
    """An input of a graph.

    Args:
        name: its name.
        shape: sizes; None where an axis is free.
        dtype: numpy's name of the type.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class Sizes:
    """Rows, new tokens, and tokens that the cache holds."""

    batch: int
    new: int
    past: int


SIZES = (Sizes(2, 6, 3), Sizes(1, 6, 3), Sizes(2, 6, 0), Sizes(1, 6, 0), Sizes(2, 1, 3), Sizes(1, 1, 3))


def made_up(ports: Sequence[Port], sizes: Sizes, vocab: int, given: Mapping[str, NDArray[Any]]) -> Feeds:
    """Inputs by name.

    Args:
        ports: the graph's inputs.
        sizes: of free axes.
        vocab: token ids are below this.
        given: inputs of the user, which are taken as they are.
    """
    generator = np.random.default_rng(_SEED)
    past = effective(ports, sizes).past
    return {
        port.name: given[port.name] if port.name in given else _one(port, sizes, past, vocab, generator)
        for port in ports
    }


def effective(ports: Sequence[Port], sizes: Sizes) -> Sizes:
    """The sizes that a graph with these inputs gets: none behind a cache where there is none."""
    return sizes if any(_is_cache(port) for port in ports) else replace(sizes, past=0)


def _one(port: Port, sizes: Sizes, past: int, vocab: int, generator: np.random.Generator) -> NDArray[Any]:
    floats, rank = np.dtype(port.dtype).kind == "f", len(port.shape)
    masks = port.name.endswith("attention_mask")
    free = [sizes.batch, *[sizes.new] * max(0, rank - 1)]
    if _is_cache(port):
        free = [sizes.batch, 1, past, 1]
    elif masks:
        free[-1] = past + sizes.new
    elif port.name == "cache_position":
        free = [sizes.new]
    values: NDArray[Any]
    shape = tuple(size if fixed is None else fixed for fixed, size in zip(port.shape, free, strict=True))
    if port.name.endswith("input_ids"):
        values = generator.integers(0, vocab, shape)
    elif masks and not floats:
        values = np.ones(shape)
    elif port.name in ("position_ids", "cache_position"):
        values = np.broadcast_to(np.arange(past, past + shape[-1]), shape)
    elif port.name == "beam_idx":
        values = np.arange(shape[0])
    elif floats and not masks:
        values = generator.standard_normal(shape)
    else:
        values = np.zeros(shape) if port.dtype != "bool" else np.ones(shape)
    return np.ascontiguousarray(values).astype(port.dtype)


def _is_cache(port: Port) -> bool:
    return "past" in port.name and len(port.shape) == 4 and np.dtype(port.dtype).kind == "f"
