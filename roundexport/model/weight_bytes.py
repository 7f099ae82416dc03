"""Bytes that a model's weights take as float32, for estimates: all, the largest one, a block, a block's at once.

In: the shapes in a checkpoint.  Out: bytes.  Limits: a block is what lies outside tables over the number of blocks in
config.json, so blocks of several kinds are told by their mean.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .tensor_names import is_table

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

_BLOCKS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers")
_EXPERT = re.compile(r".*\.experts\.\d+\.")


@dataclass(frozen=True)
class WeightBytes:
    """Bytes as float32.

    Args:
        whole: of all weights.
        largest: of the largest, as a rule the token table or lm_head.
        block: of a block.
        step: of a block whose experts are read one at a time.
    """

    whole: int
    largest: int
    block: int
    step: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> WeightBytes:
        """Of a checkpoint."""
        sizes = {name: 4 * math.prod(shape) for name, shape in checkpoint.owned().items()}
        blocks = next((int(checkpoint.config[name]) for name in _BLOCKS if checkpoint.config.get(name)), 1)
        rest = sum(size for name, size in sizes.items() if not is_table(name))
        experts: Counter[str] = Counter()
        for name, size in sizes.items():
            if found := _EXPERT.match(name):
                experts[found[0]] += size
        block = rest // max(1, blocks)
        step = block - sum(experts.values()) // max(1, blocks) + max(experts.values(), default=0)
        return cls(sum(sizes.values()), max(sizes.values(), default=0), block, step)
