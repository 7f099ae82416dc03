"""Positions of several axes (M-RoPE): of text one number thrice, of a picture's rows time, height and width.

    text        p, p, p                                 p counts on from what is behind
    picture     p, p + row, p + column                  and p + max(rows, columns) is behind it

So a picture of many rows takes few positions, and what follows stands at another position than its place in the prompt.
Numbers of pictures' rows (token_rows.py) say which picture a place is of and where it began; a row of a session keeps,
for every picture in it, where it began and at which position.

Source: get_rope_index of transformers 5.23's Qwen2.5-VL and Qwen3-VL; held against it in tests/runtime/test_qwen_vl.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .token_rows import TokenRows
from .types import Ids

AXES = 3


@dataclass(frozen=True)
class Place:
    """A picture in a row: the places it takes, its first position, and by how much positions behind it are off."""

    start: int
    end: int
    position: int
    shift: int


Places = list[Place]
"""Pictures of one row, in order."""


def positions(rows: TokenRows, places: Places, past: int, tokens: Sequence[int]) -> Ids:
    """Positions [3, S] of tokens behind ``past`` others; pictures among them are added to ``places``."""
    found = np.empty((AXES, len(tokens)), np.int64)
    at = 0
    while at < len(tokens):
        picture = rows.picture(tokens[at])
        if picture is None:
            end = next((n for n in range(at, len(tokens)) if tokens[n] >= rows.vocabulary), len(tokens))
            found[:, at:end] = np.arange(past + at, past + end) + shift(places, past + at)
            at = max(end, at + 1)
            continue
        first, (height, width) = picture
        offset = tokens[at] - first
        start = past + at - offset
        place = next((one for one in places if one.start == start), None)
        if place is None:
            position = start + shift(places, start)
            moved = position + max(height, width) - (start + height * width)
            place = Place(start, start + height * width, position, moved)
            places.append(place)
        count = min(height * width - offset, len(tokens) - at)
        inside = np.arange(offset, offset + count)
        found[:, at : at + count] = place.position
        found[1, at : at + count] += inside // width
        found[2, at : at + count] += inside % width
        at += count
    return found


def whole_positions(rows: TokenRows | None, ids: Ids) -> Ids:
    """Positions of whole sequences [B, S]: [3, B, S], or [B, S] where they have no axes and ``rows`` is None."""
    if rows is None:
        return np.tile(np.arange(ids.shape[1], dtype=np.int64), (len(ids), 1))
    return np.stack([positions(rows, [], 0, row) for row in ids.tolist()], 1)


def shift(places: Places, at: int) -> int:
    """Position less place of a token that stands at ``at``."""
    return next((one.shift for one in reversed(places) if one.end <= at), 0)


def begun(places: Places, length: int) -> Places:
    """The pictures of a row's first ``length`` tokens."""
    return [one for one in places if one.start < length]
