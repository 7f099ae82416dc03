"""RTN, round to nearest: every weight goes to the nearest code of the grid that its group's extremes span.

The grid is SignRound's at its start (kernels/fake_quant.py): zero always inside, signed full range when symmetric, the
scale rounded to its stored dtype first.  No data, no loop, seconds for any model.  It is the floor that every other
method is measured against, and what embeddings get under all of them: an error in a table's row touches only its own
token, and at 8 bits there is nothing left to tune.  Only a table of 4 bits that lm_head reads is rounded otherwise, by
`gram` for what enters it (decision 0078), and every table by `bct`.

In: a weight [N, K].  Out: codes, scales, zero points.  Limits: none beyond the scheme's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from roundexport.algorithms.interface import BlockInputs, BlockResult, BlockSize, RoundingMethod
from roundexport.kernels.round_to_nearest import CHUNK
from roundexport.kernels.round_to_nearest import run as round_to_nearest
from roundexport.model.blocks import linears, weight_of
from roundexport.quant.spec import QuantSpec


@dataclass(frozen=True)
class RtnSettings:
    """RTN has none."""

    def forward_passes(self, samples: int) -> float:
        """Block forwards over one sample that tuning a block takes: none."""
        return 0.0

    def rtn_equivalents(self) -> float:
        """Work on weights alone: they are rounded to nearest once."""
        return 1.0

    def peak_floats(self, size: BlockSize) -> float:
        """Float32 values held at most beside the block."""
        return 8.0 * CHUNK + size.weights / 4


def tune_block(
    block: nn.Module, inputs: BlockInputs | None, specs: Mapping[str, QuantSpec], settings: RtnSettings
) -> BlockResult:
    """Quantize a block's linears one by one.

    Args:
        block: the block; not changed.
        inputs: not used.
        specs: scheme by the linear's name in the block.
        settings: none.

    Returns:
        The quantized weights; no loss is measured.

    Raises:
        SpecError: a scheme does not fit its weight.
    """
    del inputs, settings
    modules = linears(block)
    return BlockResult({name: round_to_nearest(weight_of(modules[name]), spec) for name, spec in specs.items()})


METHOD = RoundingMethod(RtnSettings, tune_block, needs_calibration=False)
