"""How large a package will be, before anything is tuned: by the shapes in a checkpoint.

    bytes = 1.15 · (weights · bits + tables · their bits) / 8      of a float model
          = what is packed in its files + 4 · other weights        of one that others have quantized

In: shapes and settings.  Out: bytes.  Limits: rough; tables are told by their names, and bits that are chosen per layer
are known before the choice only where their mean is asked for: a target in nats may take all that there is to choose,
one in speed about what is as fast.
"""

from __future__ import annotations

import math

from roundexport.model.checkpoint import Checkpoint
from roundexport.model.tensor_names import is_table
from roundexport.tuning.settings import TuneSettings

_SCALES = 1.15  # scales, zero points and headers beside the codes


def weight_count(checkpoint: Checkpoint) -> int:
    """All weights."""
    return sum(math.prod(shape) for shape in checkpoint.owned().values())


def package_bytes(checkpoint: Checkpoint, settings: TuneSettings) -> float:
    """Of codes and scales; tables by ``embedding_bits``, or float.  What others have packed stays as large as it is."""
    if checkpoint.imported is not None:
        imported = sum(layer.out_features * layer.in_features for layer in checkpoint.imported.opened.layers.values())
        return checkpoint.imported.packed_bytes + 4 * (weight_count(checkpoint) - imported)
    tables = sum(math.prod(s) for name, s in checkpoint.owned().items() if len(s) == 2 and is_table(name))
    others = weight_count(checkpoint) - tables
    return _SCALES * (others * _bits(settings) + tables * _table_bits(settings)) / 8


def _table_bits(settings: TuneSettings) -> float:
    own = settings.embedding_bits
    if own == "plan" and settings.target_bits is not None:
        return min(settings.target_bits, 8)  # the mean of tables and layers
    return own if isinstance(own, int) else 32 if own is None else 8


def _bits(settings: TuneSettings) -> float:
    """Mean bits of what is no table."""
    most = max(settings.choices)
    if settings.target_bits is not None:
        return min(settings.target_bits, most)
    if settings.target_kl is not None:
        return most
    if settings.target_speedup is not None:
        return min(4 / min(settings.target_speedup, 1), most)
    return 8 if settings.recipe == "w8a8" else settings.bits
