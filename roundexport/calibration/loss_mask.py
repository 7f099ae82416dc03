"""Which positions of the samples count in a loss: not padding, nor a decoder's last, whose output predicts nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from roundexport.model.checkpoint import Checkpoint


def loss_mask(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """The mask of token ids [samples, length]: 1 where a position counts."""
    config = checkpoint.config
    mask = torch.ones(ids.shape)
    pad = config.get("pad_token_id")
    if isinstance(pad, int) and pad not in (config.get("eos_token_id"), config.get("bos_token_id")):
        mask[ids == pad] = 0
    if checkpoint.task == "generate":
        mask[:, -1] = 0
    return mask
