"""The programs that a package of a model holds: one, or two of a model with two halves or of a decoder that is cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from roundexport.model.image_size import size_unit
from roundexport.types import OF_IMAGES, PAIRS

from .capture import Capture, capture
from .grid_stages import grid_stages
from .halves import Half
from .kept_captures import capture_once
from .stages import STAGES

if TYPE_CHECKING:
    from roundexport.model.checkpoint import Checkpoint


def captures(
    checkpoint: Checkpoint,
    overrides: Mapping[str, NDArray[np.float32]] | None = None,
    max_context: int | None = None,
    cross: bool = False,
    whole: bool = True,
    pooled: bool = False,
    embeds: bool = False,
    lists: bool = False,
) -> tuple[Capture, ...]:
    """Capture a model, each half by itself where it has two; the one whose output is the model's comes last.

    Args:
        checkpoint: the float model.
        overrides: see :func:`capture`.
        max_context: see :func:`capture`.
        cross: keys and values of cross-attention travel between the halves, see halves.py.
        whole: see :func:`capture`.
        pooled: see :func:`capture`.
        embeds: cut a decoder behind its table of tokens, see stages.py.
        lists: let a tower that reads pictures of any size read lists, see grid_stages.py.

    Raises:
        UsageError, UnsupportedError, ArtifactError: as of :func:`capture`.
    """
    if embeds:
        return tuple(capture(checkpoint, overrides, max_context, whole, stage=stage) for stage in STAGES)
    if lists and checkpoint.task in OF_IMAGES and size_unit(checkpoint) is not None:
        first = capture(checkpoint, overrides, max_context, whole, stage="patches")
        rest = grid_stages(first.config)[1:]
        return (first, *(capture(checkpoint, overrides, max_context, whole, stage=stage) for stage in rest))
    if checkpoint.task not in PAIRS:
        return (capture_once(checkpoint, overrides, max_context, whole, pooled),)
    halves = (Half("encoder", cross), Half("decoder", cross))
    return tuple(capture(checkpoint, overrides, max_context, whole, half=half) for half in halves)
