"""Pixels that tuning and checks see: pictures of a folder, or pictures drawn here where there are none.

    FOLDER     its picture files in order of their names, prepared as preprocessor_config.json says
    self       dead leaves: opaque disks of random colors fall on each other until the canvas is covered; radii r with
               density r^-3 between 2 pixels and half of the picture

Pictures of dead leaves have edges, areas and the 1/f² power spectrum of photographs, but nothing to recognize, so
photographs of the kind that the model will see are better; whoever gives none is told so.
Source: dead leaves as a model of natural images: Lee, Mumford, Huang, IJCV 41 (2001).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import UsageError
from roundexport.model.image_size import image_shape, preprocessor_of
from roundexport.storage.checksums import sha256_file

if TYPE_CHECKING:
    from roundexport.model.checkpoint import Checkpoint

Pixels = NDArray[np.float32]
Bytes = NDArray[np.uint8]

DRAWN = "no pictures were given, so the model is shown drawn ones (dead leaves); --calibration FOLDER takes yours"
_LEAVES = 2000
_SMALLEST = 2.0


def calibration_pixels(
    checkpoint: Checkpoint, source: str, num_samples: int, seed: int
) -> tuple[Pixels, dict[str, Any], tuple[str, ...]]:
    """Pixels [samples, C, height, width], what a manifest says of them, and what a user should know.

    Args:
        checkpoint: a model of images.
        source: ``self``, or a folder of pictures.
        num_samples: samples wanted; fewer where the folder holds fewer.
        seed: of what is drawn.

    Raises:
        UsageError: no such folder, or no pictures in it.
    """
    if source == "self":
        return drawn_pixels(checkpoint, num_samples, seed), {"kind": "drawn", "source": "dead leaves"}, (DRAWN,)
    folder = Path(source)
    if not folder.is_dir():
        raise UsageError(f"calibration {source!r}: this is a model of images; give a folder of pictures, or self")
    pixels = folder_pixels(checkpoint, folder, num_samples)
    digests = sorted({sha256_file(path) for path in picture_files(folder)[: len(pixels)]})
    return pixels, {"kind": "images", "folder": folder.name, "pictures_sha256": digests}, ()


def picture_files(source: str | Path) -> Sequence[Path]:
    """The pictures of a folder in the order in which they are read; none where there is no folder.

    Raises:
        UsageError: a folder without pictures.
    """
    from roundexport.runtime.images import pictures_in

    return pictures_in(Path(source)) if Path(source).is_dir() else ()


def drawn_pixels(checkpoint: Checkpoint, count: int, seed: int) -> Pixels:
    """Pixels [count, C, height, width] of pictures that are drawn here."""
    from roundexport.runtime.images import MINUS_ONE_TO_ONE

    channels, height, width = image_shape(checkpoint)
    prepared = preprocessor_of(checkpoint) or MINUS_ONE_TO_ONE
    generator = np.random.default_rng(seed)
    pictures = (dead_leaves(height, width, generator) for _ in range(count))
    return np.stack([prepared.normalized(picture)[:channels] for picture in pictures])


def folder_pixels(checkpoint: Checkpoint, folder: Path, count: int) -> Pixels:
    """Pixels of the first pictures of a folder.

    Raises:
        UsageError: none can be read, or the model does not say how they are prepared.
    """
    from roundexport.runtime.images import FILE

    prepared = preprocessor_of(checkpoint)
    if prepared is None:
        raise UsageError(f"{checkpoint.location} has no {FILE}, which says how pictures are prepared for it")
    return np.stack([prepared(path) for path in picture_files(folder)[:count]])


def pixels_digest(pixels: Pixels) -> str:
    """The sha256 of pixels as little-endian float32, row by row."""
    return hashlib.sha256(np.ascontiguousarray(pixels, "<f4").tobytes()).hexdigest()


def dead_leaves(height: int, width: int, generator: np.random.Generator) -> Bytes:
    """A picture [height, width, 3] of disks on each other."""
    most = max(height, width) / 2
    # Density r^-3 between two radii, by inverting its cumulative distribution.
    share = generator.random(_LEAVES)
    radii = (1 / _SMALLEST**2 - share * (1 / _SMALLEST**2 - 1 / most**2)) ** -0.5
    centers = generator.random((_LEAVES, 2)) * (height, width)
    colors = generator.integers(0, 256, (_LEAVES + 1, 3), np.uint8)
    picture = np.empty((height, width, 3), np.uint8)
    picture[...] = colors[-1]
    for radius, (row, column), color in zip(radii, centers, colors, strict=False):
        top, left = max(0, int(row - radius)), max(0, int(column - radius))
        part = picture[top : int(row + radius) + 1, left : int(column + radius) + 1]
        rows, columns = np.ogrid[top : top + part.shape[0], left : left + part.shape[1]]
        part[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = color
    noise = generator.normal(0, 4, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)
