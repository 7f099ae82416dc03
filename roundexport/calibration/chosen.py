"""What ``--calibration auto``, the default, stands for: the model's own text and the bundled one, half and half.

    decoder with a tokenizer      self:0.5,bundled.txt:0.5; the bundled text gives no more samples than it has
    one that cannot write         bundled.txt: its config names no token to begin a text with
    any other model               self: words of the vocabulary, drawn pictures

A small model's own text, drawn at temperature 1, is strange enough that a model calibrated on it alone loses more on
what people write; one calibrated on novels alone loses more on everything else (decision 0075).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from roundexport.errors import UsageError
from roundexport.model.positions import max_positions

from .mixture import AUTO, BUNDLED, SELF
from .self_generated import can_write
from .text import cut_samples, encoder_of, read_text

if TYPE_CHECKING:
    from roundexport.model.checkpoint import Checkpoint


def chosen_source(checkpoint: Checkpoint, source: str, num_samples: int, sample_len: int) -> str:
    """The source itself, or what ``auto`` stands for with this model.

    Args:
        checkpoint: the model.
        source: what ``--calibration`` names.
        num_samples: samples wanted.
        sample_len: tokens per sample; cut to the model's positions.
    """
    if source != AUTO:
        return source
    if checkpoint.task != "generate":
        return SELF
    if not can_write(checkpoint):
        return str(BUNDLED) if _held(checkpoint, BUNDLED, 1, sample_len) else SELF
    half = num_samples // 2
    count = _held(checkpoint, BUNDLED, half, sample_len) if half else 0
    if count == 0:
        return SELF
    share = round(count / num_samples, 6)
    return f"{SELF}:{round(1 - share, 6)},{BUNDLED}:{share}"


def _held(checkpoint: Checkpoint, text: Path, wanted: int, sample_len: int) -> int:
    """Samples that a text has, up to so many."""
    length = min(sample_len, max_positions(checkpoint))
    try:
        return len(cut_samples(encoder_of(checkpoint), lambda _: read_text(text), text.name, wanted, length))
    except UsageError:  # less than one, or no tokenizer that can be read
        return 0
