"""From a picture to what a model of images reads, as the folder's preprocessor_config.json says.

    file ─ RGB ─ resize ─ crop the center ─ · rescale_factor ─ (x − image_mean) / image_std ─ pixels [C, height, width]

    size {height, width}      exactly that
    size {shortest_edge}      the shorter side, the other in proportion
    size a number             the shorter side where the center is cropped afterwards, else both
    merge_size                multiples of patch_size · merge_size, about in proportion, with so many pixels (Qwen-VL);
                              at most `_MOST_UNITS` of them, whatever the file allows: attention takes their square

Keys that are left out have the defaults that transformers' processors share; size, mean and deviation must be there, as
every family has others.  Pillow reads and resizes; arrays [height, width, 3] of bytes need it only to be resized.

Source: transformers' image processors for Pillow (image_processing_backends.py), held against them in
tests/runtime/test_images.py.
Limits: one picture makes one array of a fixed size; processors that cut a picture into tiles are read by tiles.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import ArtifactError, UnsupportedError, UsageError

from .types import Floats

if TYPE_CHECKING:
    from PIL.Image import Image

Bytes = NDArray[np.uint8]
Picture: TypeAlias = "str | Path | Image | Bytes"
"""A file, a Pillow image, or an array [height, width, 3]."""
FILE = "preprocessor_config.json"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_BILINEAR = 2  # Pillow's number; what processors resize with that do not say
_BICUBIC = 3  # likewise, of those that give pictures of any size
_LONGEST = 200  # times the shorter side
_MOST_UNITS = 1280  # what the processor has where it is not told
_SQUARE = 16  # multiples of the unit along an edge of calibration pictures


@dataclass(frozen=True)
class Area:
    """Sizes of pictures that keep about their own.

    Args:
        unit: height and width are multiples of it.
        least: pixels.
        most: pixels.
    """

    unit: int
    least: int
    most: int

    def __post_init__(self) -> None:
        if self.unit < 1 or not 0 < self.least <= self.most or self.most < self.unit**2:
            raise ValueError(f"pictures of {self.least} to {self.most} pixels in multiples of {self.unit}")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that a picture is resized to.

        Raises:
            UsageError: it is far longer than wide.
        """
        if max(height, width) > _LONGEST * min(height, width):
            raise UsageError(f"a picture of {height} x {width} is too long; at most {_LONGEST} times its shorter side")
        found = [round(edge / self.unit) * self.unit for edge in (height, width)]
        if found[0] * found[1] > self.most:
            beta = math.sqrt(height * width / self.most)
            found = [max(self.unit, math.floor(edge / beta / self.unit) * self.unit) for edge in (height, width)]
        elif found[0] * found[1] < self.least:
            beta = math.sqrt(self.least / (height * width))
            found = [math.ceil(edge * beta / self.unit) * self.unit for edge in (height, width)]
        return found[0], found[1]

    @property
    def square(self) -> tuple[int, int]:
        """A usual size, for pictures that must have one."""
        least, most = (math.sqrt(pixels) / self.unit for pixels in (self.least, self.most))
        edge = self.unit * max(1, min(max(_SQUARE, math.ceil(least)), math.floor(most)))
        return edge, edge


@dataclass(frozen=True)
class Preprocessor:
    """How pictures become pixels.

    Args:
        size: height and width after resizing; one number is the shorter side's; a range of areas; None: it is not
            resized.
        crop: height and width of the center that is kept; None: everything is.
        resample: Pillow's number of the filter.
        scale: what bytes are multiplied by.
        mean: of each channel, subtracted.
        deviation: of each channel, divided by.
    """

    size: tuple[int, int] | int | Area | None
    crop: tuple[int, int] | None
    resample: int
    scale: float
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int] | None:
        """Height and width of the pixels; None where they depend on the picture."""
        return self.crop or (self.size if isinstance(self.size, tuple) else None)

    def __call__(self, picture: str | Path | Image | Bytes) -> Floats:
        """Pixels [C, height, width] of a picture: a file, a Pillow image, or an array [height, width, 3] of bytes.

        Raises:
            UsageError: it cannot be read, or Pillow is not installed.
        """
        values = bytes_of(picture)
        if self.size is not None:
            values = resized(values, self._size_for(*values.shape[:2]), self.resample)
        if self.crop is not None:
            values = _cropped(values, self.crop)
        return self.normalized(values)

    def normalized(self, values: Bytes) -> Floats:
        """Pixels [C, height, width] of bytes [height, width, C] that have their size already."""
        scaled = values.astype(np.float64) * self.scale
        mean, deviation = (np.asarray(values, np.float32) for values in (self.mean, self.deviation))
        shifted = (scaled.astype(np.float32) - mean) / deviation
        return np.ascontiguousarray(shifted.transpose(2, 0, 1), np.float32)

    def _size_for(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.size, tuple):
            return self.size
        if isinstance(self.size, Area):
            return self.size.size(height, width)
        short, edge = min(height, width), self.size or 0
        long = int(edge * max(height, width) / short)
        return (edge, long) if height <= width else (long, edge)


MINUS_ONE_TO_ONE = Preprocessor(None, None, _BILINEAR, 1 / 255, (0.5,) * 3, (0.5,) * 3)
"""Pixels from -1 to 1, for drawn pictures of a model that does not say what it wants."""


def read_preprocessor(config: Mapping[str, Any], where: str) -> Preprocessor:
    """What a preprocessor_config.json says.

    Args:
        config: its values.
        where: the file, for the error.

    Raises:
        ArtifactError: a value that makes no sense, or one that must be there and is not.
        UnsupportedError: a processor that makes something else of a picture than one array.
    """
    if config.get("do_image_splitting") or config.get("do_pad"):
        raise UnsupportedError(f"{where}: pictures that are cut into tiles or padded are not read")
    try:
        crop = _pair(config.get("crop_size")) if config.get("do_center_crop") else None
        size: tuple[int, int] | int | Area | None = None
        free = "merge_size" in config
        if free:
            size = _area(config)
        elif config.get("do_resize", True):
            size = _size(config["size"], cropped=crop is not None)
        plain = not config.get("do_normalize", True)
        mean = (0.0,) * 3 if plain else tuple(float(one) for one in config["image_mean"])
        deviation = (1.0,) * 3 if plain else tuple(float(one) for one in config["image_std"])
        scale = float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0
        resample = config.get("resample")
        if resample is None:
            resample = _BICUBIC if free else _BILINEAR
        return Preprocessor(size, crop, int(resample), scale, mean, deviation)
    except KeyError as error:
        raise ArtifactError(f"{where}: {error} is missing; pictures cannot be prepared without it") from error
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{where}: a value makes no sense: {error}") from error


def _area(config: Mapping[str, Any]) -> Area:
    """Of a processor that gives pictures of any size; its bounds have two spellings."""
    if not config.get("do_resize", True):
        raise ValueError("pictures of any size that are not resized to whole patches")
    given = config.get("size") or {}
    least = given.get("shortest_edge", config.get("min_pixels"))
    most = given.get("longest_edge", config.get("max_pixels"))
    if least is None or most is None:
        raise KeyError("min_pixels" if least is None else "max_pixels")
    unit = int(config["patch_size"]) * int(config["merge_size"])
    return Area(unit, int(least), min(int(most), _MOST_UNITS * unit**2))


def size_unit(config: Mapping[str, Any]) -> int | None:
    """What height and width of a feature are in pixels, where pictures keep about their own size; else None."""
    return int(config["patch_size"]) * int(config["merge_size"]) if "merge_size" in config else None


def _size(given: Any, cropped: bool) -> tuple[int, int] | int:
    if isinstance(given, int):
        return given if cropped else (given, given)
    if "shortest_edge" in given:
        if "longest_edge" in given:
            raise ValueError("size with shortest_edge and longest_edge gives pictures of any size")
        return int(given["shortest_edge"])
    return _pair(given)


def _pair(given: Any) -> tuple[int, int]:
    pair = (given, given) if isinstance(given, int) else (int(given["height"]), int(given["width"]))
    if min(pair) < 1:
        raise ValueError(f"a size of {pair}")
    return pair


def bytes_of(picture: str | Path | Image | Bytes) -> Bytes:
    """Bytes [height, width, 3] of a picture: a file, a Pillow image, or such an array.

    Raises:
        UsageError: it cannot be read, or Pillow is not installed.
    """
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise UsageError(
                f"a picture as an array is [height, width, 3] of uint8, not {list(picture.shape)} of {picture.dtype}"
            )
        return picture
    module = pillow()
    if not isinstance(picture, module.Image):
        try:
            with module.open(picture) as opened:
                return np.asarray(opened.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise UsageError(f"{picture} cannot be read as a picture: {error}") from error
    try:
        return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:  # an opened file is decoded only now
        raise UsageError(f"the picture cannot be read: {error}") from error


def resized(values: Bytes, size: tuple[int, int], resample: int) -> Bytes:
    """Bytes of another height and width, by Pillow's filter of that number."""
    if values.shape[:2] == size:
        return values
    module = pillow()
    return np.asarray(module.fromarray(values).resize((size[1], size[0]), resample))


def _cropped(values: Bytes, size: tuple[int, int]) -> Bytes:
    """The center; black where the picture is smaller."""
    for axis, wanted in enumerate(size):
        have = values.shape[axis]
        if have < wanted:
            before = -(-(wanted - have) // 2)
            around = [(0, 0)] * 3
            around[axis] = (before, wanted - have - before)
            values = np.pad(values, around)
        start = (values.shape[axis] - wanted) // 2
        values = values.take(range(start, start + wanted), axis)
    return values


def pillow() -> Any:
    """The module of Pillow that reads pictures.

    Raises:
        UsageError: it is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError(
            "pictures are read by Pillow, which is not installed; pip install 'roundexport[images]'"
        ) from error
    return Image


def pictures_in(folder: Path) -> Sequence[Path]:
    """Picture files of a folder, by name.

    Raises:
        UsageError: there are none.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    if not found:
        raise UsageError(f"{folder} holds no pictures ({', '.join(ENDINGS)})")
    return found
