"""The size of the pixels that a model of images gets: what its preprocessor makes, else what its config was made for.

A model may be used at another size than it was trained for (DINOv2: positions for 518 pixels, pictures of 224), so
preprocessor_config.json counts first.  A graph is made for one size; its batch is free.  Of a model that cuts pictures
into tiles the part that reads images reads a tile, and calibration shows it pictures as one.  A tower that reads any
size (Qwen-VL) is calibrated on squares; its graph takes every multiple of its unit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from roundexport.errors import ArtifactError, CheckpointError
from roundexport.storage.paths import safe_join
from roundexport.storage.strict_json import parse

if TYPE_CHECKING:
    from roundexport.runtime.images import Preprocessor

    from .checkpoint import Checkpoint

_CHANNELS = 3
_AS_ONE_TILE = {"do_image_splitting": False, "do_pad": False, "do_center_crop": False, "do_resize": True}


def preprocessor_of(checkpoint: Checkpoint) -> Preprocessor | None:
    """How pictures are prepared for a model, all to one size; None where its folder does not say.

    Raises:
        CheckpointError: the file makes no sense.
        UnsupportedError: a preparation that makes something else of a picture than one array.
    """
    from roundexport.runtime.images import Area

    prepared = _read(checkpoint)
    if prepared is not None and isinstance(prepared.size, Area):
        return replace(prepared, size=prepared.size.square)
    return prepared


def size_unit(checkpoint: Checkpoint) -> int | None:
    """What height and width of the pixels are multiples of, of a model that reads any size; None: it reads one.

    Raises:
        CheckpointError: as of :func:`preprocessor_of`.
    """
    from roundexport.runtime.images import Area

    prepared = _read(checkpoint)
    return prepared.size.unit if prepared is not None and isinstance(prepared.size, Area) else None


def _read(checkpoint: Checkpoint) -> Preprocessor | None:
    from roundexport.runtime.images import FILE, read_preprocessor

    path = safe_join(checkpoint.folder, FILE)
    if not path.is_file():
        return None
    try:
        config = parse(path.read_bytes(), str(path))
        if checkpoint.part == "vision" and config.get("do_image_splitting"):
            config = {**config, **_AS_ONE_TILE, "size": checkpoint.config.get("image_size")}
        return read_preprocessor(config, str(path))
    except ArtifactError as error:
        raise CheckpointError(str(error)) from error


def image_shape(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """Channels, height and width of the pixels.

    Raises:
        CheckpointError: neither file says.
    """
    prepared = preprocessor_of(checkpoint)
    channels = checkpoint.config.get("num_channels")
    size = (prepared.shape if prepared else None) or _pair(checkpoint.config.get("image_size"))
    if size is None:
        raise CheckpointError(
            f"{checkpoint.location}: neither config.json nor its preprocessor says how large images are"
        )
    return (channels if isinstance(channels, int) else _CHANNELS, *size)


def _pair(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, list) and len(size) == 2 else None
