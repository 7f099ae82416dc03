"""Adam for gradients that are computed by hand, with moments that can be saved.

    m ← β₁m + (1-β₁)g        v ← β₂v + (1-β₂)g²        p ← p - rate·(m/(1-β₁ᵗ)) / (√(v/(1-β₂ᵗ)) + ε)

scaling_training.py and teq_noise.py use torch.optim.Adam.  The end-to-end finisher (_window.py) uses this one: its
gradients come from a formula, every tensor has its own rate, and an interrupted run must resume to the same bytes.  So
the state is a flat dict of tensors and one count, which fit into a safetensors file.  The state of torch.optim.Adam is
a nested dict, and a parameter group per tensor would be needed for the rates.

In: tensors to update in place.  Source: Kingma and Ba, arXiv 1412.6980, with β₁ = 0.9; β₂ = 0.95 suits short runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_FIRST, _LEAST = 0.9, 1e-12


class Adam:
    """The moments of a list of tensors, and the update.

    Args:
        tensors: updated in place by :meth:`step`; they need no ``requires_grad``.
        second: β₂.

    Attributes:
        count: steps so far.
    """

    def __init__(self, tensors: Sequence[Tensor], second: float = 0.95) -> None:
        self._decay = second
        self._tensors = list(tensors)
        self._first = [torch.zeros_like(tensor) for tensor in tensors]
        self._second = [torch.zeros_like(tensor) for tensor in tensors]
        self.count = 0

    def step(self, gradients: Sequence[Tensor], rates: Sequence[float]) -> None:
        """Update every tensor with its gradient, at its rate."""
        self.count += 1
        mean, scale = 1 - _FIRST**self.count, 1 - self._decay**self.count
        moments = zip(self._tensors, self._first, self._second, strict=True)
        for (tensor, first, second), gradient, rate in zip(moments, gradients, rates, strict=True):
            first.lerp_(gradient, 1 - _FIRST)
            second.lerp_(gradient.square(), 1 - self._decay)
            tensor.sub_((first / mean) / ((second / scale).sqrt() + _LEAST), alpha=rate)

    def moments(self) -> dict[str, Tensor]:
        """Both moments by name (the tensors, not copies); with ``count`` they are the whole state."""
        return {
            f"{kind}.{number:05}": tensor
            for kind, tensors in (("first", self._first), ("second", self._second))
            for number, tensor in enumerate(tensors)
        }
