"""Latent codes: finished integer codes as continuous variables that gradient steps can train further.

Every code c₀ gets a latent value u: the float weight in units of the scale, clamped to c₀ ± 0.4.  It rounds to c₀, and
stays 0.1 away from where it would round to another code, so the codes are unchanged at the start.  Every scale gets a
factor d, 1 at the start:

    s = stored(d·s₀)        c = clamp(round(u), -z, L - z)        ŵ = s·c
    ∂u = ∂ŵ·s  (straight through)        ∂d = Σ ∂ŵ·c·s₀        u ← u - rate·sign ∂u        d ← d - rate/5·sign ∂d

A group whose float weights are all 0 keeps its latent codes, so it stays exactly 0.

gram.py uses the sign steps above for its polish; the end-to-end finisher (_window.py) takes ∂u and ∂d into Adam.

Source: the steps are SignRound's (signround.py).  SignRound trains an offset of at most half a code from the weight; a
latent code may move to any code.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from roundexport.kernels import stored_scales
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec

_INSIDE = 0.4  # largest distance of u from its code at the start
_SCALE_SHARE = 0.2  # of a step, for the scale's factor: a fifth of a code's step moves all codes of a group


@dataclass(frozen=True, eq=False)
class Point:
    """Values of u [N, G, group] and d [N, G, 1]."""

    position: Tensor
    factor: Tensor


class LatentCodes:
    """The latent codes of one linear; a :class:`roundexport.algorithms.common.sign_descent.Rounding`.

    Args:
        spec: the scheme.
        weight: float weight [N, K].
        centered_codes: code - z, whole numbers [N, K].
        scale: [N, G], stored values.
        zero_point: [N, G].
    """

    def __init__(
        self, spec: QuantSpec, weight: Tensor, centered_codes: Tensor, scale: Tensor, zero_point: Tensor
    ) -> None:
        rows, groups = scale.shape
        self.spec = spec
        self.base, self.zero = scale[..., None], zero_point[..., None]
        start = centered_codes.view(rows, groups, -1)
        self.position = torch.clamp(weight.view_as(start) / self.base, start - _INSIDE, start + _INSIDE)
        self.factor = torch.ones_like(self.base)
        self._moves = weight.view_as(start).ne(0).any(-1, keepdim=True)
        self.scale, self.centered_codes = self._evaluate()

    @classmethod
    def of(cls, weight: Tensor, linear: QuantizedLinear) -> LatentCodes:
        """Of a quantized linear and its float weight [N, K], on the weight's device."""
        device = weight.device
        zero = torch.tensor(linear.full_zero_points(), device=device).float()
        codes = torch.tensor(linear.unpack(), device=device).float()
        centered_codes = (codes.view(*zero.shape, -1) - zero[..., None]).view_as(codes)
        scale = torch.tensor(linear.scales, device=device).float()
        return cls(linear.spec, weight.float(), centered_codes, scale, zero)

    def weight(self) -> Tensor:
        """ŵ at the present point, [N, K]."""
        self.scale, self.centered_codes = self._evaluate()
        return (self.centered_codes * self.scale).view(len(self.centered_codes), -1)

    def gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """∂u and ∂d, given ∂loss/∂ŵ [N, K]."""
        grouped = gradient.view_as(self.centered_codes)
        return grouped * self.scale, (grouped * self.centered_codes).sum(-1, keepdim=True) * self.base

    def step(self, gradient: Tensor, size: float) -> None:
        """One sign step: u by ``size``, d by a fifth of it."""
        position, factor = self.gradients(gradient)
        self.position.sub_(position.sign_().mul_(self._moves), alpha=size)
        self.factor.sub_(factor.sign_(), alpha=size * _SCALE_SHARE)

    def state(self) -> Point:
        """A copy of the present point."""
        return Point(self.position.clone(), self.factor.clone())

    def restore(self, state: Point) -> None:
        """Go back to a point."""
        self.position, self.factor = state.position.clone(), state.factor.clone()

    def quantized(self) -> QuantizedLinear:
        """The integers of the last :meth:`weight`."""
        return pack(
            self.spec, self.centered_codes.view(len(self.centered_codes), -1), self.scale[..., 0], self.zero[..., 0]
        )

    def _evaluate(self) -> tuple[Tensor, Tensor]:
        low, high = -self.zero, self.spec.max_code - self.zero
        return (
            stored_scales.stored(self.base * self.factor, self.spec),
            torch.maximum(torch.minimum(self.position.round(), high), low),
        )


def pack(spec: QuantSpec, centered_codes: Tensor, scale: Tensor, zero_point: Tensor) -> QuantizedLinear:
    """Centered codes [N, K], stored scales [N, G] and zero points [N, G] packed; nothing is rounded again."""
    rows, groups = scale.shape
    codes = (
        (centered_codes.view(rows, groups, -1) + zero_point[..., None]).cpu().numpy().astype(np.uint8).reshape(rows, -1)
    )
    numbers = scale.cpu().numpy().astype(spec.scale_array)
    return QuantizedLinear.from_unpacked(
        spec, codes, numbers, None if spec.symmetric else zero_point.cpu().numpy().astype(np.uint8)
    )
