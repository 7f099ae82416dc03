"""Round to nearest: every weight goes to the nearest code of the grid that its group's extremes span.

The grid is fake_quant.py's with V = 0 and α = β = 1.  `reference` is numpy on the whole weight; `run` is torch, rows
in parts, so that a vocabulary's table takes little memory.  Rows do not depend on each other: both give the same bits.

In: a weight [N, K].  Out: codes, scales, zero points.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from roundexport.kernels import fake_quant
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 22  # weights rounded at a time

reference = fake_quant.reference
available = fake_quant.available


def run(weight: Tensor, spec: QuantSpec) -> QuantizedLinear:
    """Round a weight [N, K] to nearest, some rows at a time.

    Raises:
        SpecError: the group size does not divide K, or a scale is not finite.
    """
    rows, width = weight.shape
    step = max(1, CHUNK // width)
    parts = [_rows(weight[start : start + step], spec) for start in range(0, rows, step)]
    return QuantizedLinear.concatenate_rows(parts)


def _rows(weight: Tensor, spec: QuantSpec) -> QuantizedLinear:
    import torch

    grouped = fake_quant.Grouped.of(weight.float(), spec)
    ones = torch.ones_like(grouped.least)
    fake = fake_quant.run(grouped, torch.zeros_like(grouped.weight), ones, ones)
    return fake_quant.to_quantized(grouped, fake)
