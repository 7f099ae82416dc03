"""A transformers model filled by name from a checkpoint that transformers cannot read: one that others quantized.

transformers reads such folders only with their owners' packages, and then computes in those packages' kernels.  Here
the class is built from the config and each parameter gets its dequantized values, so the model is a plain float one.
Limits: families whose names or shapes transformers converts while loading are refused, by the missing parameter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from roundexport.errors import CheckpointError
from roundexport.types import Task

from .experts import split_experts
from .tensor_names import HEAD
from .transformers_loading import build_model


class Weights(Protocol):
    """What is asked of a checkpoint."""

    folder: Path
    location: str
    trust_remote_code: bool
    task: Task
    tied: bool

    def part_config(self) -> Any: ...  # noqa: D102

    def has(self, name: str) -> bool: ...  # noqa: D102

    def may_lack(self, name: str) -> bool: ...  # noqa: D102

    def float32(self, name: str) -> NDArray[np.float32]: ...  # noqa: D102


def filled_model(checkpoint: Weights, dtype: str) -> torch.nn.Module:
    """The class that a checkpoint's task asks for, with the checkpoint's values.

    Args:
        checkpoint: any.
        dtype: name of a torch dtype.

    Raises:
        CheckpointError: transformers cannot build it, or the weights leave parameters unset.
    """
    config = checkpoint.part_config()
    if checkpoint.has(HEAD):
        config.tie_word_embeddings = checkpoint.tied
    model: torch.nn.Module = build_model(
        checkpoint.folder, config, checkpoint.trust_remote_code, checkpoint.task, attention=None
    )
    split_experts(model)
    unset = []
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if checkpoint.has(name):
                values.copy_(torch.from_numpy(checkpoint.float32(name)))
            elif isinstance(values, torch.nn.Parameter) and not checkpoint.may_lack(name):
                unset.append(name)
    if unset:
        raise CheckpointError(
            f"{checkpoint.location}: the weights lack {len(unset)} parameters, the first is {unset[0]}"
        )
    return model.to(getattr(torch, dtype)).eval()
