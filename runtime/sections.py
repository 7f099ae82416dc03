"""A package that is larger than memory, run section by section: one part of its graph is open at a time.

    streams   rows of tokens that go through the graph together, call by call; each has a cache of its own
    section   a run of the graph's operators whose weights take no more than so many bytes
    for every section: open it, take every call of every stream through it, keep what crosses to the next, close it

Every weight is opened once, whatever the number of calls, so a decoder's prompts and single tokens cost a pass over the
file together.  What the tokens are must be known beforehand: this compares and scores, it does not write text.

The operators are those of the package, with the same attributes and weights; only what the runtime would fuse across a
cut is not fused.  Cuts are where few values cross, and never between a constant and what reads it.

Limits: decoders and graphs without a cache; not models with two graphs, nor graphs that read vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from roundexport.errors import UnsupportedError
from roundexport.formats.package import PackageManifest
from roundexport.types import EMBEDS, PAIRS

from .axis_positions import AXES
from .types import EngineOptions, Floats, Ids

Arrays = Mapping[str, Any]
_ENGINES = {"onnx": "_ort_sections", "openvino": "_ov_sections"}


@dataclass(frozen=True)
class Stream:
    """Calls of a graph that follow one another, on a cache that is empty at first.

    Args:
        calls: inputs by name; those that the graph lacks are left out.
    """

    calls: Sequence[Arrays]


def token_stream(ids: Ids, ends: Sequence[int]) -> Stream:
    """Rows of tokens, appended piece by piece.

    Args:
        ids: [B, S].
        ends: where each piece ends, ascending; the last is S.
    """
    return Stream([_tokens(ids, begin, end) for begin, end in pairwise([0, *ends])])


def _tokens(ids: Ids, begin: int, end: int) -> dict[str, Any]:
    rows = len(ids)
    return {
        "input_ids": np.ascontiguousarray(ids[:, begin:end], np.int64),
        "attention_mask": np.ones((rows, end), np.int64),
        "position_ids": np.tile(np.arange(begin, end, dtype=np.int64), (rows, 1)),
        "beam_idx": np.arange(rows, dtype=np.int32),
    }


def takes_sections(manifest: PackageManifest) -> bool:
    """Whether a package can be run so."""
    return manifest.task not in PAIRS and not manifest.settings.get(EMBEDS)


def run_in_sections(
    folder: Path, manifest: PackageManifest, options: EngineOptions, section_bytes: int, streams: Sequence[Stream]
) -> Iterator[list[Arrays]]:
    """What the graph gives, a stream at a time.

    Args:
        folder: the package.
        manifest: its description.
        options: as for opening it whole; the device is the CPU.
        section_bytes: most bytes of weights in a section, as they are in the file; a single weight may have more.
        streams: what to take through it.

    Returns:
        For every stream and call the graph's outputs by name, without caches.

    Raises:
        UnsupportedError: the package cannot be run so.
        ArtifactError: the runtime refuses a section.
    """
    if not takes_sections(manifest):
        raise UnsupportedError(f"{folder}: a package of two graphs cannot be run in sections")
    engine = import_module(f"{__package__}.engines.{_ENGINES[manifest.target]}")
    yield from engine.run(folder, manifest, options, section_bytes, streams)


def with_axes(feeds: Arrays, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Feeds of a graph with inputs of these ranks: what it lacks left out, positions with axes where it wants them."""
    kept = {name: array for name, array in feeds.items() if name in ranks}
    places = kept.get("position_ids")
    if places is not None and ranks["position_ids"] > places.ndim:
        kept["position_ids"] = np.tile(places, (AXES, 1, 1))
    return kept


def cut_places(weights: Sequence[int], crossing: Sequence[int], most: int) -> list[int]:
    """Where a sequence of operators is cut.

    Args:
        weights: bytes that each operator adds.
        crossing: values that cross a cut before each operator; a negative number forbids one.
        most: bytes of a section.

    Returns:
        Ascending places, each the first operator of a section but the first.
    """
    cuts: list[int] = []
    held: list[tuple[int, int]] = []  # places where this section may end, and its bytes before them
    size = place = begin = 0
    while place < len(weights):
        if place > begin and crossing[place] >= 0:
            held.append((place, size))
        if size + weights[place] > most and held:
            filled = [one for one in held if one[1] >= most / 2] or held
            place = begin = min(filled, key=lambda one: (crossing[one[0]], -one[1]))[0]
            cuts.append(begin)
            size, held = 0, []
            continue
        size += weights[place]
        place += 1
    return cuts


__all__ = ["Floats", "Stream", "cut_places", "run_in_sections", "takes_sections", "token_stream", "with_axes"]
