"""The order in which training loops take samples."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def shuffled_batches(samples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Sample indices for each step: all samples in random order, reshuffled when less than a batch is left."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, samples)
    while True:
        order = torch.randperm(samples, generator=generator)
        for start in range(0, samples - size + 1, size):
            yield order[start : start + size]
