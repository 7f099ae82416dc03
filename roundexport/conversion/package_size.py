"""How large a package will be, before anything is tuned: by the shapes in a checkpoint.

    bytes = 1.15 · (weights · bits + tables · their bits) / 8

In: shapes and settings.  Out: bytes.  Limits: rough; bits that are chosen per layer count as ``bits``, tables are told
by their names.
"""

from __future__ import annotations

import math

from roundexport.model.checkpoint import Checkpoint
from roundexport.tuning.settings import TuneSettings

_SCALES = 1.15  # scales, zero points and headers beside the codes


def weight_count(checkpoint: Checkpoint) -> int:
    """All weights."""
    return sum(math.prod(shape) for shape in checkpoint.owned().values())


def package_bytes(checkpoint: Checkpoint, settings: TuneSettings) -> float:
    """Of codes and scales; tables by ``embedding_bits``, or float."""
    tables = sum(
        math.prod(s) for n, s in checkpoint.owned().items() if len(s) == 2 and ("embed" in n or "lm_head" in n)
    )
    others, own = weight_count(checkpoint) - tables, settings.embedding_bits
    bits = own if isinstance(own, int) else 32 if own is None else 8
    return _SCALES * (others * settings.bits + tables * bits) / 8
