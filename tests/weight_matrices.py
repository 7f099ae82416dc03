"""Every weight matrix of a model in the order of its modules, for artifacts that tests write without a tuner."""

from __future__ import annotations

import torch

from roundexport.model.checkpoint import Checkpoint
from roundexport.quant.spec import LinearInfo


def weight_matrices(checkpoint: Checkpoint, poolers: bool = False) -> list[LinearInfo]:
    """Linears, then embeddings; a tied head is part of its embedding.  Conv1D too, which is stored turned.

    Args:
        checkpoint: the model.
        poolers: whether linears of a pooler count, which the exported outputs do not need.
    """
    linears, embeddings = [], []
    model = checkpoint.load_model()
    head = model.get_output_embeddings() if checkpoint.task == "generate" else None
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            shared = ("lm_head",) if tied and module is model.get_input_embeddings() else ()
            embeddings.append(LinearInfo(name, *module.weight.shape[::-1], "embedding", shared))
        elif type(module).__name__ == "Conv1D":
            linears.append(LinearInfo(name, *module.weight.shape))
        elif isinstance(module, torch.nn.Linear) and not (tied and module is head):
            linears.append(LinearInfo(name, *module.weight.shape[::-1]))
    return [info for info in linears if poolers or "pooler" not in info.name] + embeddings
