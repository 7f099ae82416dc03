"""Tensors that a model has and its file has not: computed from the config, or joined of several that the file holds.

    sines       positions of some models with two halves (encoder_decoder.py)
    joined      OLMo-Hybrid's linear_attn.conv1d.weight [C, 1, K] is the rows of q_conv1d, k_conv1d and v_conv1d

What is joined here is small and stays float.  Source: conversion_mapping.py of transformers 5.23.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from roundexport.types import PAIRS, Task

from .encoder_decoder import computed_tensors

_JOINED: dict[str, dict[str, tuple[str, ...]]] = {
    "olmo_hybrid": {
        "linear_attn.conv1d.weight": tuple(f"linear_attn.{part}_conv1d.weight" for part in "qkv"),
    },
}  # fmt: skip


class Weights(Protocol):
    """What is asked of a checkpoint."""

    task: Task
    config: dict[str, Any]

    @property
    def model_type(self) -> str: ...  # noqa: D102

    def float32(self, name: str) -> NDArray[np.float32]: ...  # noqa: D102


def derived_tensors(checkpoint: Weights, names: dict[str, str]) -> dict[str, NDArray[np.float32]]:
    """Values by name in the model.

    Args:
        checkpoint: the model.
        names: name in the model -> name in the file; those of which others are joined are taken out.
    """
    found = dict(computed_tensors(checkpoint.config, names)) if checkpoint.task in PAIRS else {}
    for whole, parts in _JOINED.get(checkpoint.model_type, {}).items():
        first = parts[0]
        for path in [name.removesuffix(first) for name in names if name.endswith(f".{first}")]:
            owners = [path + part for part in parts]
            if all(owner in names for owner in owners):
                found[path + whole] = np.concatenate([checkpoint.float32(owner) for owner in owners])
                for owner in owners:
                    del names[owner]
    return found
