"""Gemma 3n: a layer may keep the largest of its gates, by mean and deviation; how many is a number of its config.

    gates ← relu(gates - mean - deviation · Φ⁻¹(sparsity))

Φ⁻¹, of a constant, is computed here: no runtime has it as an operator.  Attention needs nothing.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

from torch import Tensor
from torch.nn import functional

from .interface import Architecture, Trace


def gaussian_topk(layer: Any, _: Trace, inputs: Tensor) -> Tensor:
    """In place of Gemma3nTextMLP._gaussian_topk."""
    cutoff = NormalDist().inv_cdf(float(layer.activation_sparsity))
    deviation = inputs.std(dim=-1, keepdim=True, unbiased=False)
    return functional.relu(inputs - (inputs.mean(dim=-1, keepdim=True) + deviation * cutoff))


ARCHITECTURE = Architecture({"Gemma3nTextMLP._gaussian_topk": gaussian_topk})
