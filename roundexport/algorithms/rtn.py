"""RTN, round to nearest: every weight goes to the nearest code of the grid that its group's extremes span.

The grid is SignRound's at its start (kernels/fake_quant.py): zero always inside, signed full range when symmetric, the
scale rounded to its stored dtype first.  No data, no loop, seconds for any model.  It is the floor that every other
method is measured against, and what embeddings and lm_head get under all of them: an error in a table's row touches
only its own token, and at 8 bits there is nothing left to tune.

In: a weight [N, K].  Out: codes, scales, zero points.  Limits: none beyond the scheme's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from roundexport.blocks import linears, weight_of
from roundexport.kernels import fake_quant
from roundexport.methods import BlockInputs, BlockResult, BlockSize
from roundexport.quantized import QuantizedLinear
from roundexport.spec import QuantSpec

NEEDS_CALIBRATION = False
_CHUNK = 1 << 22  # weights rounded at a time: bounds the memory for a large vocabulary's table


@dataclass(frozen=True)
class Settings:
    """RTN has none."""

    def cost(self, samples: int) -> float:
        """Block forwards over one sample that tuning a block takes: none."""
        return 0.0

    def memory(self, size: BlockSize) -> float:
        """Float32 values held at most beside the block."""
        return 8.0 * _CHUNK + size.weights / 4


def tune_block(
    block: nn.Module, inputs: BlockInputs | None, specs: Mapping[str, QuantSpec], settings: Settings
) -> BlockResult:
    """Quantise a block's linears one by one.

    Args:
        block: the block; not changed.
        inputs: not used.
        specs: scheme by the linear's name in the block.
        settings: none.

    Returns:
        The quantised weights; no loss is measured.

    Raises:
        SpecError: a scheme does not fit its weight.
    """
    del inputs, settings
    modules = linears(block)
    return BlockResult({name: quantize(weight_of(modules[name]), spec) for name, spec in specs.items()})


def quantize(weight: Tensor, spec: QuantSpec) -> QuantizedLinear:
    """Round a weight [N, K] to nearest, some rows at a time.

    Raises:
        SpecError: the group size does not divide K, or a scale is not finite.
    """
    rows, width = weight.shape
    step = max(1, _CHUNK // width)
    parts = [_rows(weight[start : start + step], spec) for start in range(0, rows, step)]
    if len(parts) == 1:
        return parts[0]
    return QuantizedLinear(
        spec,
        width,
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        None if spec.symmetric else np.concatenate([part.full_zero_points() for part in parts]),
    )


def _rows(weight: Tensor, spec: QuantSpec) -> QuantizedLinear:
    grouped = fake_quant.Grouped.of(weight.float(), spec)
    ones = torch.ones_like(grouped.least)
    fake = fake_quant.run(grouped, torch.zeros_like(grouped.weight), ones, ones)
    rounded: QuantizedLinear = fake_quant.to_quantized(grouped, fake)
    return rounded
