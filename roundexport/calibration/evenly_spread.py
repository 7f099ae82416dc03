"""Some of the calibration samples, for what need not see them all: samples of a mixture alternate, neighbors repeat.

In: how many there are, and how many are wanted.  Out: their numbers, in order, the first and the last among them.
What is summed over tokens counts samples as such of 512: of shorter ones it takes more.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TOKENS = 512  # of a sample, as it is counted where sums are taken


def evenly_spread(samples: int, most: int) -> Tensor:
    """Numbers of samples at equal distances, at most so many of them; int64."""
    return torch.linspace(0, samples - 1, min(most, samples)).round().long()


def samples_for(asked: int, length: int) -> int:
    """How many samples of a length hold as many tokens as so many of 512, and no fewer samples."""
    return asked * -(-_TOKENS // length)


def enough_tokens(ids: Tensor, asked: int) -> Tensor:
    """Of samples [n, S] some that hold as many tokens as so many of 512, or all."""
    return ids[evenly_spread(len(ids), samples_for(asked, ids.shape[1]))]
