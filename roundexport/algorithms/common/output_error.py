"""What rounding loses of a linear's output, from sums over the calibration tokens that are at hand anyway.

    share(Ŵ) = tr (Ŵ - T) H (Ŵ - T)ᵀ / tr T H Tᵀ        H = Σ x̂ᵀx̂,  T the weight that was aimed at

That is the squared error of the output over all tokens as a share of the output's own energy: 0 is nothing lost, 1 as
bad as a weight of zeros.  It is told for rounding to nearest and for what a method made of the same weight, so that
layers of all sizes stand on one scale.

In: weights [N, K] and H with damping on its diagonal, which is taken off again.  Out: two shares, to four digits.
Limits: at most 256 rows of each weight, evenly spaced, are looked at: three products of 256 · K², next to 3.2 · K² per
token for H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from roundexport.kernels.round_to_nearest import run as round_to_nearest
from roundexport.quant.spec import QuantSpec

_ROWS = 256


def shares_lost(
    weight: Tensor,
    rounded: Tensor,
    gram: Tensor,
    repair: Tensor,
    shift: Tensor | None = None,
    *,
    added: float,
    spec: QuantSpec,
) -> tuple[float, float] | None:
    """Shares of the output's energy lost by rounding to nearest, and by ``rounded``.

    Args:
        weight: W [N, K].
        rounded: Ŵ [N, K].
        gram: H with ``added`` on its diagonal, [K, K].
        repair: what T has beside W: T = W + W · repairᵀ + shift, [K, K].
        shift: likewise, [N, K]; None: nothing.
        added: to the diagonal of ``gram``.
        spec: the scheme.

    Returns:
        Before and after; None where the output is 0 on every token.
    """
    rows = torch.linspace(0, len(weight) - 1, min(len(weight), _ROWS)).long().to(weight.device)
    nearest = torch.from_numpy(round_to_nearest(weight[rows].cpu(), spec).dequantize()).to(weight.device)
    aim = torch.addmm(weight[rows], weight[rows], repair.t())
    if shift is not None:
        aim += shift[rows]
    before, after, whole = (_energy(w, gram, added) for w in (nearest - aim, rounded[rows] - aim, aim))
    return None if whole <= 0 else (_digits(before / whole), _digits(after / whole))


def _energy(weight: Tensor, gram: Tensor, added: float) -> float:
    """Tr W (H - added · I) Wᵀ; not below 0, which it can be by float32's rounding."""
    exact = ((weight @ gram).double() * weight).sum() - added * weight.double().square().sum()
    return max(0.0, float(exact))


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
