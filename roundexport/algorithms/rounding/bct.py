"""BCT, blockwise compression of transformers, its weight side: four bits for every weight, and shifts for scales.

Every matrix of the model (linears, token, position and token-type tables, heads) is cut along its rows into groups,
each with a scale that is a power of two: ŵ = (code - z)·(±2**e), so that scaling an integer is a shift.  Norms and
biases become eight-bit integers with one power of two each (int8_tensor.py).  A scale costs one byte, which leaves

    bits per weight = 4 + 8/group           whole rows of 384: 4.02; 7.9 times smaller than float32 takes 176 and more

Per group the exponent and its sign are searched, as in optimal_rtn.py (kernels/grid_search.py tries every power of two
near the one that spans the group).  The chosen power is the one whose nearest codes have the least

    Σ h·(ŵ - w)²        h = mean square of the input that meets the weight, over the calibration tokens; 1 in tables

The power that spans a group is off by up to √2 from the best scale, and clipping its few largest weights often costs
less than doubling the step.  Scales cannot be stretched afterwards as in optimal_rtn.py.

The method quantizes every weight (TuneSettings.everything), embeddings to four bits; other settings are refused.  Other
rounding methods can use the same grid: with ``scale_dtype`` exponent8, signround learns the rounding on it.

The paper's abstract states: post-training, all layers and embeddings, block by block, 7.988 times smaller.  Its full
text and code were not available, so these parts are a reconstruction: shifts as scales; a block that is part of one row
and not a tile of the matrix, because runtimes support groups along K only; the search and its weights.  The paper also
quantizes all intermediate results and computes with integers only: integer_encoder/ does that for encoders.

In: a block, its hidden states.  Out: codes, scales and zero points.  Source: arXiv 2304.01483 (BCT), 2303.09184 (BBCT).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from roundexport.algorithms.interface import BlockInputs, BlockResult, BlockSize, RoundingMethod, SchemeNeeds
from roundexport.errors import UsageError
from roundexport.kernels import searched_rounding
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec

from . import optimal_rtn

_CHUNK = 1 << 22  # weights of a table rounded at a time


@dataclass(frozen=True)
class BctSettings:
    """How the block's inputs are measured.

    Args:
        batch_size: samples that go through the block at a time.

    Raises:
        UsageError: batch_size is not positive.
    """

    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {self.batch_size}")

    def forward_passes(self, samples: int) -> float:
        """Block forwards over one sample that tuning a block takes."""
        return float(samples)

    def rtn_equivalents(self) -> float:
        """Work on weights alone, in roundings of them to nearest."""
        return 1.0

    def peak_floats(self, size: BlockSize) -> float:
        """Float32 values held at most, besides the block: its weights once more."""
        return float(size.weights)


def tune_block(
    block: nn.Module, inputs: BlockInputs, specs: Mapping[str, QuantSpec], settings: BctSettings
) -> BlockResult:
    """Quantize a block's linears, each for its inputs from the quantized prefix.

    Args:
        block: the block with its float weights, on ``inputs.device``; not changed.
        inputs: hidden states.
        specs: scheme by the linear's name in the block.
        settings: batch size.

    Returns:
        The quantized weights; no loss is measured.

    Raises:
        SpecError: a scheme does not fit its weight, or inputs are not finite.
    """
    looked_at = optimal_rtn.OptimalRtnSettings(settings.batch_size, quantized_inputs=True, keep_size=False)
    return optimal_rtn.tune_block(block, inputs, specs, looked_at)


def quantize_table(weight: Tensor, spec: QuantSpec) -> QuantizedLinear:
    """Round a table [N, K] to nearest on its searched grid, all columns alike, some rows at a time.

    Raises:
        SpecError: the group size does not divide K, or a number is not finite.
    """
    rows, width = weight.shape
    even, step = torch.ones(width, device=weight.device), max(1, _CHUNK // width)
    parts = [
        searched_rounding.run(weight[start : start + step], spec, even, keep_size=False)
        for start in range(0, rows, step)
    ]
    return QuantizedLinear.concatenate_rows(parts)


METHOD = RoundingMethod(
    BctSettings,
    tune_block,
    scheme_needs=SchemeNeeds("exponent8", embedding_bits=4, everything=True),
    quantize_table=quantize_table,
)
