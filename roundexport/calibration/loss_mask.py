"""Which positions of the samples count in a loss: not padding, nor a decoder's last, whose output predicts nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from roundexport.model.checkpoint import Checkpoint


def loss_mask(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """The mask of token ids [samples, length]: 1 where a position counts."""
    special = checkpoint.tokens
    mask = torch.ones(ids.shape)
    pad = special["pad"]
    if pad is not None and pad not in (special["bos"], *special["eos"]):
        mask[ids == pad] = 0
    if checkpoint.task == "generate":
        mask[:, -1] = 0
    return mask
