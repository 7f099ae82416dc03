"""Fake quantization: a weight under a scheme as a function of SignRound's three tensors, and its gradient.

Per group of weights w that share a scale, with b bits, V the rounding offset (one per weight, 0 at the start) and α, β
the clip coefficients of the group's least and largest weight (1 at the start), f16 rounding to the stored dtype:

    asymmetric   L = 2**b - 1,  lo = α·min(w, 0),  hi = β·max(w, 0)          zero is always inside the range
                 s  = max(f16((hi - lo) / L), 1e-5)         z = round(-lo / s)
                 code = clamp(round(w / s + V) + z, 0, L)
    symmetric    P = 2**(b-1),  m = max(-lo, hi)            full range: the larger side lands on code 0 exactly
                 s  = f16(m / P) where -lo > hi, else f16(-m / P); |s| at least 1e-5.     THE SCALE MAY BE NEGATIVE
                 code = clamp(round(w / s + V), -P, P-1) + P          z = P

and ŵ = (code - z)·s.  Rounding is half to even.  `reference` is numpy; `run` is the same arithmetic in torch, operation
by operation, so that both give the same bits.

Where scales are stored as powers of two (scale_dtype exponent8), f16 stands for 2**round(log2 |·|) with the sign kept,
s is at least 2**-24, and z is held in 0 … L.  It may be as little as √½ of what spans the range, so weights clip.

Gradient.  Rounding counts as the identity (straight-through), the clamp lets the gradient through where it does not
bind (mask M).  With g = ∂loss/∂ŵ, c = code - z and sums over the group:

    ∂V = g·s·M         ∂s = Σ g·(c - M·w/s) [+ ∂z·lo/s²]        ∂z = -s·Σ g·(1 - M)      (asymmetric only)
    (∂z = 0 where z was held in 0 … L)
    ∂lo = -∂s/L - ∂z/s     ∂hi = ∂s/L           symmetric: ∂m = ±∂s/P, for the side or sides that gave m
    ∂α = ∂lo·min(w, 0)     ∂β = ∂hi·max(w, 0)

`gradients` computes these directly: no graph of ten elementwise operations per weight need be kept and walked back.
Source: auto-round 0.16.1, data_type/int.py (quant_tensor_asym, quant_tensor_sym).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from roundexport.quant import power_of_two
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec

if TYPE_CHECKING:
    from torch import Tensor

# Least magnitude of a scale, by stored dtype; 1e-5 as float16 has it, so that stored and computed scale are one number.
SMALLEST_SCALE = {"float16": float(np.float16(1e-5)), "float32": 1e-8, "exponent8": 2.0**power_of_two.LEAST_TUNED}


def available() -> str | None:
    """None when torch is there, which `run` needs; else the reason."""
    from importlib.util import find_spec

    return None if find_spec("torch") else "torch is not installed; pip install 'roundexport[tune]'"


def reference(
    weight: NDArray[np.float32],
    spec: QuantSpec,
    rounding_offset: NDArray[np.float32] | None = None,
    min_scale: NDArray[np.float32] | None = None,
    max_scale: NDArray[np.float32] | None = None,
) -> QuantizedLinear:
    """Quantize a weight.

    Args:
        weight: float32 [N, K].
        spec: the scheme.
        rounding_offset: V, float32 [N, K]; zeros when absent (round to nearest).
        min_scale: α, float32 [N, G], in 0 … 1; ones when absent.
        max_scale: β, likewise.

    Returns:
        Codes, scales and zero points; its ``dequantize()`` is ŵ.

    Raises:
        SpecError: the group size does not divide K, or a scale is not finite.
    """
    rows, width = weight.shape
    grouped = weight.astype(np.float32).reshape(rows, spec.groups(width), -1)
    low = np.minimum(grouped.min(-1, keepdims=True), np.float32(0))
    high = np.maximum(grouped.max(-1, keepdims=True), np.float32(0))
    if min_scale is not None:
        low = low * min_scale[..., None]
    if max_scale is not None:
        high = high * max_scale[..., None]
    scale = _scale_numpy(low, high, spec)
    unrounded = grouped / scale
    if rounding_offset is not None:
        unrounded = unrounded + rounding_offset.reshape(grouped.shape)
    zero = np.full_like(scale, spec.midpoint) if spec.symmetric else _zero_numpy(low, scale, spec)
    codes = np.clip(np.rint(unrounded) + zero, 0, spec.max_code).astype(np.uint8).reshape(rows, width)
    scales = scale[..., 0].astype(spec.scale_array)
    return QuantizedLinear.from_unpacked(spec, codes, scales, None if spec.symmetric else zero[..., 0].astype(np.uint8))


def _scale_numpy(low: NDArray[np.float32], high: NDArray[np.float32], spec: QuantSpec) -> NDArray[np.float32]:
    smallest = np.float32(SMALLEST_SCALE[spec.scale_dtype])
    with np.errstate(over="ignore"):  # a scale beyond float16 becomes infinite and is refused by QuantizedLinear
        if not spec.symmetric:
            stored = _stored_numpy((high - low) / np.float32(spec.max_code), spec)
            return np.maximum(stored, smallest)
        largest = np.maximum(-low, high) / np.float32(spec.midpoint)
        stored = _stored_numpy(np.where(high < -low, largest, -largest), spec)
    return np.where(stored < 0, np.minimum(stored, -smallest), np.maximum(stored, smallest))


def _zero_numpy(low: NDArray[np.float32], scale: NDArray[np.float32], spec: QuantSpec) -> NDArray[np.float32]:
    zero: NDArray[np.float32] = np.rint(-low / scale)
    return np.minimum(zero, np.float32(spec.max_code)) if spec.scale_dtype == "exponent8" else zero


def _stored_numpy(scale: NDArray[np.float32], spec: QuantSpec) -> NDArray[np.float32]:
    if spec.scale_dtype == "exponent8":
        return power_of_two.nearest(scale)
    return scale.astype(spec.scale_dtype).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Grouped:
    """A weight cut into groups, with what does not change while it is tuned; all torch tensors on one device.

    Args:
        spec: the scheme.
        weight: float32 [N, G, group].
        least: float32 [N, G, 1], the smaller of 0 and the group's least weight.
        largest: likewise the larger.
    """

    spec: QuantSpec
    weight: Tensor
    least: Tensor
    largest: Tensor

    @classmethod
    def of(cls, weight: Tensor, spec: QuantSpec, where: str = "weight") -> Grouped:
        """Cut a float32 weight [N, K] into groups.

        Raises:
            SpecError: the group size does not divide K; the text names ``where``.
        """
        rows, width = weight.shape
        grouped = weight.detach().contiguous().view(rows, spec.groups(width, where), -1)
        return cls(
            spec, grouped, grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
        )

    def hold_zeros(self, moved: Tensor) -> None:
        """Set what was learned, [N, G, group], back to 0 in groups that are 0 throughout: they stay exactly 0."""
        moved.masked_fill_(self.least == self.largest, 0.0)


@dataclass(frozen=True, eq=False)
class Fake:
    """One evaluation of `run`; float32 torch tensors, shapes as in :class:`Grouped`.

    Args:
        weight: ŵ [N, G, group].
        centered_codes: code - z [N, G, group].
        unclamped: the same before the clamp.
        scale: s [N, G, 1], a value the stored dtype holds exactly.
        zero_point: z [N, G, 1]; P everywhere when symmetric.
        free: [N, G, 1], 1 where the smallest scale does not bind, else 0.
    """

    weight: Tensor
    centered_codes: Tensor
    unclamped: Tensor
    scale: Tensor
    zero_point: Tensor
    free: Tensor


def run(grouped: Grouped, rounding_offset: Tensor, min_scale: Tensor, max_scale: Tensor) -> Fake:
    """Fake-quantize with torch; no autograd graph is made, see :func:`gradients`.

    Args:
        grouped: the weight.
        rounding_offset: V, float32 [N, G, group].
        min_scale: α, float32 [N, G, 1], in 0 … 1.
        max_scale: β, likewise.
    """
    import torch

    spec = grouped.spec
    with torch.no_grad():
        low, high = grouped.least * min_scale, grouped.largest * max_scale
        scale, free = _scale_torch(low, high, spec)
        zero = torch.full_like(scale, spec.midpoint) if spec.symmetric else _zero_torch(low, scale, spec)
        unclamped = (grouped.weight / scale).add_(rounding_offset).round_()
        centered = torch.maximum(torch.minimum(unclamped, spec.max_code - zero), -zero)
        return Fake(centered * scale, centered, unclamped, scale, zero, free)


def _scale_torch(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    import torch

    smallest = SMALLEST_SCALE[spec.scale_dtype]
    if spec.symmetric:
        largest = torch.maximum(-low, high) / spec.midpoint
        exact = torch.where(high < -low, largest, -largest)
    else:
        exact = (high - low) / spec.max_code
    if spec.scale_dtype == "exponent8":
        stored = nearest_power(exact)
    else:
        stored = exact.to(getattr(torch, spec.scale_dtype)).float()
    free = (stored.abs() >= smallest).float()
    return torch.where(stored < 0, stored.clamp(max=-smallest), stored.clamp(min=smallest)), free


def _zero_torch(low: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    import torch

    zero = torch.round(-low / scale)
    return zero.clamp_(max=spec.max_code) if spec.scale_dtype == "exponent8" else zero


def nearest_power(scale: Tensor) -> Tensor:
    """:func:`roundexport.quant.power_of_two.nearest` in torch, to the same bits; float32, any shape and device."""
    import torch

    mantissa, exponent = torch.frexp(scale)
    power = exponent - (mantissa.abs() <= power_of_two.ROOT_HALF).to(exponent.dtype)
    magnitude = torch.ldexp(torch.ones_like(scale), power.clamp(min=power_of_two.LEAST_TUNED))
    magnitude = torch.where(scale == 0, 2.0**power_of_two.LEAST_TUNED, magnitude)
    magnitude = torch.where((power > power_of_two.MOST_TUNED) | ~torch.isfinite(scale), torch.inf, magnitude)
    return torch.where(scale < 0, -magnitude, magnitude)


def gradients(
    grouped: Grouped, fake: Fake, gradient: Tensor, min_scale: Tensor, max_scale: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of the loss in V, α and β, as in the header.

    Args:
        grouped: the weight.
        fake: what `run` gave at the same point.
        gradient: ∂loss/∂ŵ, float32 [N, G, group].
        min_scale: α at that point.
        max_scale: β at that point.

    Returns:
        ∂V [N, G, group], ∂α [N, G, 1], ∂β [N, G, 1].
    """
    import torch

    spec = grouped.spec
    with torch.no_grad():
        inside = fake.centered_codes == fake.unclamped
        through = gradient * inside
        scale_gradient = torch.sum(
            gradient * fake.centered_codes - through * grouped.weight / fake.scale, -1, keepdim=True
        )
        if spec.symmetric:
            below, above = -grouped.least * min_scale, grouped.largest * max_scale
            side = scale_gradient * fake.free * torch.where(above < below, 1.0, -1.0) / spec.midpoint
            low_gradient, high_gradient = -side * (below >= above), side * (above >= below)
        else:
            zero_gradient = -fake.scale * torch.sum(gradient - through, -1, keepdim=True)
            low = grouped.least * min_scale
            if spec.scale_dtype == "exponent8":
                zero_gradient = zero_gradient * (torch.round(-low / fake.scale) <= spec.max_code)
            scale_gradient = (scale_gradient + zero_gradient * low / fake.scale.square()) * fake.free
            low_gradient = -scale_gradient / spec.max_code - zero_gradient / fake.scale
            high_gradient = scale_gradient / spec.max_code
        return through.mul_(fake.scale), low_gradient * grouped.least, high_gradient * grouped.largest


def to_quantized(grouped: Grouped, fake: Fake) -> QuantizedLinear:
    """The very codes, scales and zero points that `run` used, packed; nothing is rounded again."""
    spec, (rows, groups, _) = grouped.spec, grouped.weight.shape
    codes = (fake.centered_codes + fake.zero_point).to("cpu").numpy().astype(np.uint8).reshape(rows, -1)
    scales = fake.scale.view(rows, groups).cpu().numpy().astype(spec.scale_array)
    zero = None if spec.symmetric else fake.zero_point.view(rows, groups).cpu().numpy().astype(np.uint8)
    return QuantizedLinear.from_unpacked(spec, codes, scales, zero)
