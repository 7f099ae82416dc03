"""Error compensation: the weight that corrects errors of earlier layers, regularized on held-out samples.

A linear W [N, K] receives x̂ where the float model has x.  Another weight T can correct part of that difference:

    T = W + W Cᵀ (H + λ·mean(diag H)·I)⁻¹        H = Σ x̂ᵀx̂,  C = Σ x̂ᵀ(x - x̂)

This is a ridge regression from x̂ to x - x̂.  It overfits where there are few tokens for the width K.  So two samples of
eight are held out, T is fitted to the others for several λ, and the λ is chosen that has the least squared error

    Σ ‖x̂ Tᵀ - x Wᵀ‖²  =  tr (T - W) H (T - W)ᵀ - 2 tr (T - W) C Wᵀ + constant

over the held-out samples.  T is then fitted to all samples with that λ.  The error is measured on 64 rows of each
weight.  The search starts in the middle of the list of λ and goes downhill.

In: H and C over the two parts of the samples.  Out: λ.  Limits: held-out samples have the same source as the others, so
a calibration text unlike the text of use is not noticed; the search ends in a local minimum.  Cost: a Cholesky factor
of K × K for each of three to five λ.  Source: the asymmetric term of GPTAQ, arXiv 2504.02692, and of QEP, arXiv
2504.09629, which fix λ.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from roundexport.kernels import cholesky

UNSURE = 0.1  # λ where there are too few samples to hold any out
_LADDER = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_PERIOD, _FITTED = 8, 6  # samples; those that follow each other go into a sum together, without a copy
_ROWS = 64  # of each weight; the variance comes from the samples, not from the rows


def shares(start: int, count: int) -> Iterator[tuple[bool, slice]]:
    """Runs of the samples ``start``, ``start + 1``, …: whether the run is held out, and its slice of the ``count``."""
    for apart, run in groupby(range(count), lambda index: (start + index) % _PERIOD >= _FITTED):
        first, *rest = run
        yield apart, slice(first, first + len(rest) + 1)


def held_out(samples: Tensor) -> Tensor:
    """Whether each of these samples, by number, is held out."""
    return samples % _PERIOD >= _FITTED


def damped(gram_sum: Tensor, damping: float) -> Tensor:
    """H with ``damping`` times its mean diagonal added, [K, K]."""
    more = gram_sum.clone()
    # Inputs that are always 0 have a mean of 0; then any positive value keeps H invertible.
    more.diagonal().add_(damping * float(more.diagonal().mean()) or 1.0)
    return more


def solve(gram_sum: Tensor, right: Tensor, damping: float) -> Tensor:
    """(H + λ·mean(diag H)·I)⁻¹ times ``right`` [K, M]."""
    return cholesky.solve(cholesky.run(damped(gram_sum, damping)), right)


def choose(fitted: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], weights: Sequence[Tensor]) -> float:
    """The damping λ with the least error on held-out samples.

    Args:
        fitted: H and C [K, K] of the samples to fit.
        other: those of the samples held out.
        weights: the linears' weights, [N, K] each.
    """
    some = torch.cat([weight[torch.linspace(0, len(weight) - 1, min(len(weight), _ROWS)).long()] for weight in weights])
    right = fitted[1] @ some.t()

    @functools.cache
    def loss(rung: int) -> float:
        damping = _LADDER[rung]
        try:
            factor = cholesky.run(damped(fitted[0], damping))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return math.inf  # too little damping for float32
        change = cholesky.solve(factor, right).t()
        value = float(((change @ other[0]) * change).sum() - 2 * ((change @ other[1]) * some).sum())
        return value if math.isfinite(value) else math.inf

    here, best = -1, len(_LADDER) // 2
    while best != here:
        here = best
        near = range(max(0, here - 1), min(here + 2, len(_LADDER)))
        best = min(near, key=lambda rung: (loss(rung), -rung))  # of two that fail the one with more damping
    return _LADDER[here]
