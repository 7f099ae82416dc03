"""The tokens of each expert of a layer, and how much each counts: what its Gram sums are taken over.

Tokens go to an expert as the router of the quantized prefix sends them, on both sides, as that is where they will go.
With p the expert's share of token t, the layer's output changes by p times what the expert's does, so a token counts
p² (over the mean of p² among the expert's tokens).

An expert that few tokens reach has too few to fit it on: fewer than a quarter of its input width.  It gets as many more
as are missing, evenly spread over all tokens of the layer, which count a quarter of its own.  They keep the fit from
running wild in directions that its own few tokens do not show; more damping (FEW_DAMPING) does the rest.

In: what the experts were called with on either side, batch by batch, as a staged forward holds it.  Out: one expert's
tokens at a time, gathered when asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from roundexport.model.staged_forward import Arguments

FEW_DAMPING = 1.0  # of H for an expert with few tokens
_ENOUGH = 0.25  # tokens per input
_OTHERS = 0.25  # what a token counts that is not the expert's own


@dataclass(frozen=True, eq=False)
class TokensOfExpert:
    """Tokens of one expert.

    Args:
        quantized: x̂ [n, H], through what is quantized.
        floats: x [n, H] of the float model.
        weights: what each counts, [n].
        samples: number of the sample that each is of, [n].
        own: how many of them the router sent.
        few: whether others stand in.
    """

    quantized: Tensor
    floats: Tensor
    weights: Tensor
    samples: Tensor
    own: int
    few: bool


class ExpertTokens:
    """All tokens of a layer of experts.

    Args:
        calls: what the experts were called with: tokens [b·S, H], chosen experts [b·S, k], shares [b·S, k]; on the
            quantized side and on the float side.
        mask: [samples, length], positions that count.
    """

    def __init__(self, calls: Iterable[tuple[Arguments, Arguments]], mask: Tensor) -> None:
        self._sides: list[tuple[Tensor, Tensor]] = []
        chosen, shares = [], []
        for quantized, floats in calls:
            self._sides.append((quantized[0].detach(), floats[0].detach()))
            chosen.append(quantized[1])
            shares.append(quantized[2])
        self._chosen, self._shares = torch.cat(chosen), torch.cat(shares).float()
        self._length = mask.shape[1]
        self._mask = mask.reshape(-1).to(self._chosen.device).float()

    def of(self, expert: int) -> TokensOfExpert:
        """The tokens of one expert."""
        hits = self._chosen == expert
        share = (self._shares * hits).sum(1)
        own = ((share != 0) & (self._mask > 0)).nonzero()[:, 0]
        weights = share[own].square() * self._mask[own]
        weights = weights / weights.mean() if len(own) else weights
        missing = int(_ENOUGH * self._sides[0][0].shape[1]) - len(own)
        places, count = own, len(own)
        if missing > 0:
            other = ((share == 0) & (self._mask > 0)).nonzero()[:, 0]
            other = other[torch.linspace(0, len(other) - 1, min(missing, len(other))).long()]
            places = torch.cat([own, other])
            weights = torch.cat([weights, _OTHERS * self._mask[other]])
            places, order = places.sort()
            weights = weights[order]
        rows = self._rows(0, places), self._rows(1, places)
        return TokensOfExpert(*rows, weights, places // self._length, count, missing > 0)

    def _rows(self, side: int, places: Tensor) -> Tensor:
        """Tokens at ascending places among those of all batches."""
        found, begin = [], 0
        for batch in self._sides:
            inside = places[(places >= begin) & (places < begin + len(batch[side]))] - begin
            found.append(batch[side][inside])
            begin += len(batch[side])
        return torch.cat(found)
