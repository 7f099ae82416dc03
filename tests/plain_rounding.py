"""Round to nearest in plain numpy, apart from the package's own, for artifacts that tests export."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec


def round_to_nearest(weight: NDArray[np.float32], spec: QuantSpec) -> QuantizedLinear:
    """Plain rounding; symmetric scales are negative where that uses the full range, as tuners' are."""
    rows, width = weight.shape
    grouped = weight.reshape(rows, spec.groups(width), -1)
    if spec.symmetric:
        largest = np.take_along_axis(grouped, np.abs(grouped).argmax(-1, keepdims=True), -1)
        scales, zeros = -largest / spec.midpoint, np.full(largest.shape, spec.midpoint, np.float32)
    else:
        low, high = grouped.min(-1, keepdims=True).clip(max=0), grouped.max(-1, keepdims=True).clip(min=0)
        scales = (high - low) / spec.max_code
        zeros = np.clip(np.round(-low / np.maximum(scales, 1e-8)), 0, spec.max_code)
    scales = np.where(scales == 0, 1e-4, scales).astype(spec.scale_dtype)
    codes = np.clip(np.round(grouped / scales.astype(np.float32)) + zeros, 0, spec.max_code).astype(np.uint8)
    points = None if spec.symmetric else zeros[..., 0].astype(np.uint8)
    return QuantizedLinear.from_unpacked(spec, codes.reshape(rows, width), scales[..., 0], points)
