"""Some of the calibration samples, for what need not see them all: samples of a mixture alternate, neighbors repeat.

In: how many there are, and how many are wanted.  Out: their numbers, in order, the first and the last among them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def evenly_spread(samples: int, most: int) -> Tensor:
    """Numbers of samples at equal distances, at most so many of them; int64."""
    return torch.linspace(0, samples - 1, min(most, samples)).round().long()
