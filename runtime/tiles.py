"""A picture as one or more tiles of one size, as Idefics3's and SmolVLM's image processors cut it.

    resize    the longer edge to `size.longest_edge`, the other in proportion, made even
    cut       both edges up to multiples of `max_image_size.longest_edge`, then tiles of that size, row by row
    add       the whole picture at a tile's size, last

A picture that is not to be cut (`do_image_splitting` false), or that is no larger than a tile, is one tile; of a model
without tiles it is prepared by images.py.  Bytes are kept between the steps, as Pillow resizes them.

Source: image_processing_pil_idefics3.py of transformers 5.23, held against it in tests/runtime/test_seeing.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from roundexport.errors import ArtifactError, UnsupportedError

from .images import Picture, Preprocessor, bytes_of, read_preprocessor, resized
from .types import Floats

_MOST = 4096  # pixels of an edge, whatever the file says
_NOT_CUT = {"do_image_splitting": False, "do_pad": False, "do_resize": False, "do_center_crop": False}


@dataclass(frozen=True)
class Tiles:
    """A picture's pixels.

    Args:
        pixels: [tiles, C, edge, edge].
        rows: of tiles; 0 where the picture is one.
        columns: likewise.
    """

    pixels: Floats
    rows: int = 0
    columns: int = 0


@dataclass(frozen=True)
class Tiling:
    """How pictures become tiles.

    Args:
        prepared: how bytes become pixels.
        longest: edge of a picture before it is cut; None: it is not resized first.
        edge: of a tile.
        cut: whether pictures are cut.
    """

    prepared: Preprocessor
    longest: int | None
    edge: int
    cut: bool

    def __call__(self, picture: Picture) -> Tiles:
        """The tiles of a picture.

        Raises:
            UsageError: it cannot be read, or Pillow is not installed.
        """
        values, edge, filter_ = bytes_of(picture), self.edge, self.prepared.resample
        height, width = values.shape[:2]
        if self.longest is not None:
            values = resized(values, scaled(height, width, self.longest), filter_)
        height, width = values.shape[:2]
        filled = _filled(height, width, edge) if self.cut else (edge, edge)
        values = resized(values, filled, filter_)
        height, width = filled
        if max(filled) <= edge:
            return Tiles(self.prepared.normalized(values)[None])
        rows, columns = height // edge, width // edge
        parts = [
            values[row * edge : (row + 1) * edge, column * edge : (column + 1) * edge]
            for row in range(rows)
            for column in range(columns)
        ]
        parts.append(resized(values, (edge, edge), filter_))
        return Tiles(np.stack([self.prepared.normalized(part) for part in parts]), rows, columns)


def scaled(height: int, width: int, longest: int) -> tuple[int, int]:
    """Height and width with so long a longer edge; the shorter one is even, and neither is beyond what is allowed."""
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        height, width = longest, int(longest * ratio)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    ratio = width / height
    if width >= height and width > _MOST:
        width, height = _MOST, int(_MOST / ratio)
    elif height > width and height > _MOST:
        height, width = _MOST, int(_MOST * ratio)
    return max(height, 1), max(width, 1)


def _filled(height: int, width: int, edge: int) -> tuple[int, int]:
    """The next multiples of a tile's edge, in proportion first."""
    ratio = width / height
    if width >= height:
        width = math.ceil(width / edge) * edge
        height = math.ceil(int(width / ratio) / edge) * edge
    else:
        height = math.ceil(height / edge) * edge
        width = math.ceil(int(height * ratio) / edge) * edge
    return height, width


def read_tiling(config: Mapping[str, Any], where: str) -> Callable[[Picture], Tiles]:
    """What a preprocessor_config.json says of tiles; a picture is one where it says nothing.

    Args:
        config: its values.
        where: the file, for the error.

    Raises:
        ArtifactError: a value that makes no sense, or one that must be there and is not.
        UnsupportedError: a size of another kind than a longest edge.
    """
    if "max_image_size" not in config:
        whole = read_preprocessor(config, where)
        return lambda picture: Tiles(whole(picture)[None])
    try:
        edge = int(config["max_image_size"]["longest_edge"])
        size = config.get("size") or {}
        longest = int(size["longest_edge"]) if config.get("do_resize", True) else None
    except KeyError as error:
        raise UnsupportedError(f"{where}: {error} is missing; pictures are cut into tiles by it") from error
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{where}: a value makes no sense: {error}") from error
    if edge < 1 or (longest is not None and longest < 1):
        raise ArtifactError(f"{where}: edges of {longest} and {edge} make no sense")
    resample = config.get("resample")
    plain = {**config, **_NOT_CUT, "resample": _LANCZOS if resample is None else resample}
    return Tiling(read_preprocessor(plain, where), longest, edge, bool(config.get("do_image_splitting", True)))


_LANCZOS = 1  # Pillow's number; what these processors resize with that do not say
