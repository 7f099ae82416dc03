"""Which positions of the samples count in a loss: not padding, nor a decoder's last, whose output predicts nothing.

Every patch of an image counts, and every frame of a sound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from roundexport.model.checkpoint import Checkpoint
from roundexport.types import WITHOUT_TOKENS


def loss_mask(checkpoint: Checkpoint, ids: Tensor, length: int | None = None) -> Tensor:
    """The mask of samples, [samples, length]: 1 where a position counts.

    Args:
        checkpoint: the model.
        ids: token ids [samples, length], pixels or samples.
        length: positions of hidden states, where these are no token ids.
    """
    if checkpoint.task in WITHOUT_TOKENS:
        return torch.ones(len(ids), length or 1)
    special = checkpoint.tokens
    mask = torch.ones(ids.shape)
    pad = special["pad"]
    if pad is not None and pad not in (special["bos"], *special["eos"]):
        mask[ids == pad] = 0
    if checkpoint.task == "generate":
        mask[:, -1] = 0
    return mask
