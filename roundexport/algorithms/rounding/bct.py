"""BCT, blockwise compression of transformers, its weight side: four bits for every weight, and shifts for scales.

Every matrix of the model (linears, token, position and token-type tables, heads) is cut along its rows into groups,
each with a scale that is a power of two: ŵ = (code - z)·(±2**e), so that scaling an integer is a shift.  Norms and
biases become eight-bit integers with one power of two each (int8_tensor.py).  A scale costs one byte, which leaves

    bits per weight = 4 + 8/group           whole rows of 384: 4.02; 7.9 times smaller than float32 takes 176 and more

Per group the exponent and its sign are searched, as in optimal_rtn.py (kernels/grid_search.py tries every power of two
near the one that spans the group): the one whose nearest codes leave the least

    Σ h·(ŵ - w)²        h = mean square of the input that meets the weight, over the calibration tokens; 1 in tables

wins, and codes are the nearest on it.  The power that spans a group is off by up to √2 from the best scale: clipping
its few largest weights often costs less than doubling the step.  Scales cannot be stretched afterwards, as there.

Chosen by name, the method compresses everything (TuneSettings.everything), embeddings in four bits; asking for anything
else there is an error.  Any other rounding method works on the same grid: with ``scale_dtype`` exponent8 signround
learns which way weights round on it.

From the paper's abstract: after training, weights of every layer and the embeddings included, block by block, 7.988
times smaller.  Reconstruction, as no code and no full text were at hand: shifts for scales; a block that is a run of
one row, not a tile of a matrix, since runtimes know groups along K only; the search and its weighting.  The paper also
compresses all intermediate results and computes with integers only: not done here.

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
    """How the block's inputs are looked at.

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
    """Quantize a block's linears, each for the inputs that reach it through what is quantized already.

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
