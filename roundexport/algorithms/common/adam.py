"""Adam over tensors that are changed in place, for gradients that were computed elsewhere.

    m ← β₁m + (1-β₁)g        v ← β₂v + (1-β₂)g²        p ← p - rate·(m/(1-β₁ᵗ)) / (√(v/(1-β₂ᵗ)) + ε)

Source: Kingma and Ba, arXiv 1412.6980, with β₁ = 0.9; β₂ = 0.95 suits short runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_FIRST, _LEAST = 0.9, 1e-12


class Adam:
    """Moments of some tensors.

    Args:
        tensors: changed in place by :meth:`step`; no gradients are asked of them.
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
        """Move every tensor against its gradient, at its rate."""
        self.count += 1
        mean, scale = 1 - _FIRST**self.count, 1 - self._decay**self.count
        moments = zip(self._tensors, self._first, self._second, strict=True)
        for (tensor, first, second), gradient, rate in zip(moments, gradients, rates, strict=True):
            first.lerp_(gradient, 1 - _FIRST)
            second.lerp_(gradient.square(), 1 - self._decay)
            tensor.sub_((first / mean) / ((second / scale).sqrt() + _LEAST), alpha=rate)

    def moments(self) -> dict[str, Tensor]:
        """Both moments by name, the tensors themselves; with ``count`` all that :meth:`step` goes on from."""
        return {
            f"{kind}.{number:05}": tensor
            for kind, tensors in (("first", self._first), ("second", self._second))
            for number, tensor in enumerate(tensors)
        }
