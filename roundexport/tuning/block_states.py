"""`BlockStates`: hidden states between two blocks, and the mask, for the next block's task.

    before block k    float        through the float blocks 0 … k-1         [samples, length, H], in a file
                      quantized    through the same blocks as they were rounded          (hidden_states.py)
    after it          float        = target of the block's rounding         filled before the method runs, or by it
                      quantized    filled after the method, with its integers

The mask excludes positions from losses: padding, and a decoder's last position, whose output has no label.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from roundexport.model.block_call import BlockCall

from .hidden_states import Hidden


@dataclass(frozen=True, eq=False)
class BlockStates:
    """Hidden states between two blocks.

    Args:
        calls: how each block is called.
        mask: [samples, length], positions that count.
        hidden: what enters the next block.
    """

    calls: list[BlockCall]
    mask: Tensor
    hidden: Hidden
