"""Error compensation: the weight that corrects errors of earlier layers, regularized on held-out samples.

A linear W [N, K] receives x̂ where the float model has x.  Where it writes to the residual stream, that has an error of
its own, e [N] for each token: the float stream less the quantized one.  Another weight T can correct part of both:

    T = W + (C Wᵀ + D)ᵀ (H + λ·mean(diag H)·I)⁻¹        H = Σ x̂ᵀx̂,  C = Σ x̂ᵀ(x - x̂),  D = Σ x̂ᵀe

This is a ridge regression from x̂ to (x - x̂) Wᵀ + e.  It overfits where there are few tokens for the width K.  So two
samples of eight are held out, T is fitted to the others for several λ, and the λ is chosen that has the least squared
error

    Σ ‖x̂ Tᵀ - x Wᵀ - e‖²  =  tr (T - W) H (T - W)ᵀ - 2 tr (T - W) (C Wᵀ + D) + constant

over the held-out samples.  T is then fitted to all samples with that λ.  The error is measured on 64 rows of each
weight.  The search starts in the middle of the list of λ and goes downhill.

In: H, C, D over the two parts of the samples.  Out: λ.  Limits: held-out samples have the same source as the others, so
a calibration text unlike the text of use is not noticed; the search ends in a local minimum.  Cost: a Cholesky factor
of K × K for each of three to five λ.  Source: the asymmetric term of GPTAQ, arXiv 2504.02692, and of QEP, arXiv
2504.09629, which fix λ; the residual stream's of LoaQ, arXiv 2509.06297.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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


def mean_share(gram_sum: Tensor, damping: float) -> float:
    """What is to be added to H's diagonal: ``damping`` times its mean."""
    # Inputs that are always 0 have a mean of 0; then any positive value keeps H invertible.
    return damping * float(gram_sum.diagonal().mean()) or 1.0


def raised(gram_sum: Tensor, added: float, overwrite: bool = False) -> Tensor:
    """H with a value added to its diagonal, [K, K]; in H's own memory where that may be overwritten."""
    more = gram_sum if overwrite else gram_sum.clone()
    more.diagonal().add_(added)
    return more


def damped(gram_sum: Tensor, damping: float) -> Tensor:
    """H with ``damping`` times its mean diagonal added, [K, K]."""
    return raised(gram_sum, mean_share(gram_sum, damping))


@dataclass(frozen=True, eq=False)
class InputSums:
    """Sums over the tokens that enter linears.

    Args:
        gram: H [K, K].
        cross: C [K, K].
        residual: D [K, N], where they enter one linear, which writes to the residual stream.
    """

    gram: Tensor
    cross: Tensor
    residual: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def add(self, other: InputSums) -> None:
        """Add others in place."""
        for total, more in zip(self.tensors().values(), other.tensors().values(), strict=True):
            total.add_(more)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What a damping λ is tried on.

    Args:
        gram: H of the samples that are fitted, [K, K].
        right: their C Wᵀ + D for some rows of the weights, [K, R].
        other_gram: H of the samples held out.
        other_right: C Wᵀ + D of these.
    """

    gram: Tensor
    right: Tensor
    other_gram: Tensor
    other_right: Tensor

    @classmethod
    def of(cls, fitted: InputSums, other: InputSums, weights: Sequence[Tensor]) -> HeldOut:
        """From the sums of either part of the samples, and the linears' weights, [N, K] each."""
        some = [torch.linspace(0, len(weight) - 1, min(len(weight), _ROWS)).long() for weight in weights]
        rows = torch.cat([weight[own] for weight, own in zip(weights, some, strict=True)])

        def right(sums: InputSums) -> Tensor:
            found = sums.cross @ rows.t()
            return found if sums.residual is None else found.add_(sums.residual[:, torch.cat(some)])

        return cls(fitted.gram, right(fitted), other.gram, right(other))

    def loss(self, damping: float) -> float:
        """The error on the samples held out; infinity where the damping is too little for float32."""
        try:
            factor = cholesky.run(damped(self.gram, damping), overwrite=True)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return math.inf
        change = cholesky.solve(factor, self.right).t()
        energy, across = ((change @ self.other_gram) * change).sum(), (change * self.other_right.t()).sum()
        value = float(energy - 2 * across)
        return value if math.isfinite(value) else math.inf


def choose(losses: Callable[[list[float]], Iterable[float]]) -> float:
    """The damping λ with the least error on held-out samples.

    Args:
        losses: gives the errors of some dampings, in their order.
    """
    known: dict[int, float] = {}
    here, best = -1, len(_LADDER) // 2
    while best != here:
        here = best
        near = range(max(0, here - 1), min(here + 2, len(_LADDER)))
        asked = [rung for rung in near if rung not in known]
        known.update(zip(asked, losses([_LADDER[rung] for rung in asked]), strict=True))
        best = min(near, key=lambda rung: (known[rung], -rung))  # of two that fail the one with more damping
    return _LADDER[here]
