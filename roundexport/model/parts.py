"""Folders that hold several models, and which of them is meant.

    language model beside a tower    …ForConditionalGeneration      text, see text_part.py; vision if asked for
    two towers                       CLIPModel, SiglipModel         vision, see vision_part.py

A part is a model of its own: config, names and class are those that it has by itself, and no tensor of another part is
ever read.  Where nobody asks, the one that is exported is taken, and said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from roundexport.errors import UnsupportedError, UsageError
from roundexport.types import OF_IMAGES, Task

from .text_part import has_text_part
from .vision_part import has_image_side, has_towers

Part = Literal["text", "vision"]
PARTS: tuple[Part, ...] = ("text", "vision")
ALL = "all"
"""Both parts in one package, which `convert` alone makes."""


def check_part(part: str | None) -> None:
    """Refuse a part that there is not.

    Raises:
        UsageError: naming those that there are.
    """
    if part is not None and part not in (*PARTS, ALL):
        raise UsageError(f"part {part!r} is not known; parts are {', '.join(PARTS)}, and {ALL} of them for convert")


def part_of(task: Task) -> Part:
    """The part that a model of a task is, where its folder holds several."""
    return "vision" if task in OF_IMAGES else "text"


def choose_part(config: Mapping[str, Any], asked: str | None, where: str) -> Part | None:
    """The part of a folder that is taken; None of a folder that holds one model.

    Args:
        config: of config.json.
        asked: a part by name; None: whichever is exported.
        where: the folder, for the error.

    Raises:
        UsageError: an unknown part, or all of them.
        UnsupportedError: a part that is not exported.
    """
    check_part(asked)
    if asked == ALL:
        raise UsageError(f"part {ALL} is made by `convert`, which takes each part and joins them; here name one part")
    there: list[Part] = []
    if has_text_part(config):
        there = ["text", *(["vision"] if has_image_side(config) else [])]  # type: ignore[list-item]
    elif has_towers(config):
        there = ["vision"]
    if there and asked is not None and asked not in there:
        raise UnsupportedError(f"{where}: of this model the part {' or '.join(there)} is exported, not {asked}")
    return next((part for part in there if asked in (None, part)), None)


def check_kind(asked: str | None, task: Task, where: str) -> None:
    """Hold a part that was asked for against what a folder of one model is.

    Raises:
        UnsupportedError: it is another kind.
    """
    if asked is not None and asked != part_of(task):
        raise UnsupportedError(f"{where}: this is a model of {part_of(task)}; it has no {asked} part")
