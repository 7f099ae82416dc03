"""Stored scales: a computed scale rounded to the dtype in which the scheme stores it.

    float16, float32   round half to even; a magnitude beyond the largest finite number becomes that number
    exponent8          sign(s) · 2**round(log2 |s|), exponent in -24 … 15 (quant/power_of_two.py)

The sign is kept and the magnitude is at least the dtype's smallest scale (kernels/fake_quant.py), so that divisions by
it are safe; zero counts as positive.  Codes are always computed with the rounded scale, so searches and training use
exactly the stored values.

In: scales of any shape.  Out: float32 of that shape.  `reference` is numpy, `run` (and `stored`, its name) torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from roundexport.kernels import fake_quant
from roundexport.quant import power_of_two
from roundexport.quant.spec import QuantSpec

if TYPE_CHECKING:
    from torch import Tensor


def available() -> str | None:
    """None when torch is there, which `run` needs; else the reason."""
    return fake_quant.available()


def reference(scale: NDArray[np.float32], spec: QuantSpec) -> NDArray[np.float32]:
    """Nearest stored value; see :func:`stored`."""
    least, most = (np.float32(edge) for edge in _edges(spec))
    size = np.clip(np.abs(scale.astype(np.float32)), least, most)
    if spec.scale_dtype == "exponent8":
        kept = power_of_two.nearest(size)
    else:
        kept = size.astype(spec.scale_dtype).astype(np.float32)
    return np.where(scale < 0, -kept, kept)


def stored(scale: Tensor, spec: QuantSpec) -> Tensor:
    """The value nearest to each scale that the scheme's ``scale_dtype`` holds.

    Args:
        scale: float32, any shape, no NaN.
        spec: the scheme.

    Returns:
        float32, the same shape: exactly representable, sign kept, magnitude from the smallest to the largest scale.
    """
    import torch

    size = scale.float().abs().clamp(*_edges(spec))
    if spec.scale_dtype == "exponent8":
        kept = fake_quant.nearest_power(size)
    else:
        kept = size.to(getattr(torch, spec.scale_dtype)).float()
    return torch.where(scale < 0, -kept, kept)


run = stored


def _edges(spec: QuantSpec) -> tuple[float, float]:
    """Least and largest magnitude of a stored scale."""
    if spec.scale_dtype == "exponent8":
        return fake_quant.SMALLEST_SCALE[spec.scale_dtype], 2.0**power_of_two.MOST_TUNED
    return fake_quant.SMALLEST_SCALE[spec.scale_dtype], float(np.finfo(spec.scale_dtype).max)
