"""Optimal RTN: search each group's grid, weighted by the layer's inputs, then round to nearest; no tuning steps.

The error that a rounded weight adds to y = Σ_j w_j·x_j is, for inputs that are uncorrelated, Σ_j E[x_j²]·(ŵ_j - w_j)²:
an input channel counts as much as its mean square.  So

    h_j = mean of x_j² over the calibration positions that count, at the input of each linear in the float model
    s, z of every group = the grid of least Σ h_j·(ŵ_j - w_j)²                        (kernels/grid_search.py)
    code = clamp(round(w / s) + z, 0, 2**bits - 1)
    s ← s·Σ h_j·w_j² / Σ h_j·w_j·ŵ_j                       the codes stay

The last line restores the size of the outputs.  The grid of least error shrinks weights, by a tenth at 2 bits, because
its error is orthogonal to ŵ.  This error has the same sign in every layer and accumulates through the model, where
random errors mostly cancel.  The stretched scales make the projection of ŵ on w as long as w.  They cost a little error
per layer and lowered the KL of the sample model by 18 % at 2 bits, 4 % at 3, 1 % at 4.

The inputs are those of the float prefix by default, so blocks could be searched in any order.  A channel that is zero
on all calibration tokens gets a ten-thousandth of the mean importance, so that its weights still count.  An expert is
weighed by the tokens that reach it, and all its inputs alike where none does; the user is told how many have few.

In: a block, its hidden states; one forward per sample, whose outputs are the next block's inputs.  Out: codes, scales,
zero points.  Limits: correlations between inputs are ignored; the methods that tune use them.  Source: auto-round
0.16.1 with iters=0, "opt_rtn"; importance as llama.cpp's imatrix has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from roundexport.algorithms.interface import BlockInputs, BlockResult, BlockSize, RoundingMethod
from roundexport.errors import UsageError
from roundexport.kernels import searched_rounding
from roundexport.model.block_call import run_all
from roundexport.model.blocks import linears, weight_of
from roundexport.model.experts import Experts
from roundexport.model.hooks import hooks
from roundexport.quant.spec import QuantSpec

_LEAST_SHARE = 1e-4  # of the layer's mean importance, for a channel that is always zero
_ENOUGH = 0.25  # tokens per input of an expert; with fewer it is said


@dataclass(frozen=True)
class OptimalRtnSettings:
    """How the inputs are measured.

    Args:
        batch_size: samples that go through the block at a time.
        quantized_inputs: weigh by the inputs that come through the quantized prefix, not by the float model's.
        keep_size: stretch scales so that outputs keep their size; False: the least error.

    Raises:
        UsageError: batch_size is not positive.
    """

    batch_size: int = 8
    quantized_inputs: bool = False
    keep_size: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {self.batch_size}")

    def forward_passes(self, samples: int) -> float:
        """Block forwards over one sample beside those that hidden states take; float inputs are measured in theirs."""
        return float(samples) if self.quantized_inputs else 0.0

    def rtn_equivalents(self) -> float:
        """Work on weights alone, in roundings of them to nearest: the search of the grid."""
        return 20.0

    def peak_floats(self, size: BlockSize) -> float:
        """Float32 values held at most beside the block."""
        return 2.5 * size.weights + size.outputs * self.batch_size * size.length


def tune_block(
    block: nn.Module, inputs: BlockInputs, specs: Mapping[str, QuantSpec], settings: OptimalRtnSettings
) -> BlockResult:
    """Quantize a block's linears, each for its inputs.

    Args:
        block: the block with its float weights, on ``inputs.device``; not changed.
        inputs: hidden states.
        specs: scheme by the linear's name in the block.
        settings: batch size, and which inputs.

    Returns:
        The quantized weights; no loss is measured.

    Raises:
        SpecError: a scheme does not fit its weight, or inputs are not finite.
    """
    modules = linears(block)
    outputs = None if inputs.float_outputs_ready else inputs.target
    if settings.quantized_inputs:
        hidden, size = inputs.quantized_inputs, settings.batch_size
        if outputs is not None:
            run_all(block, inputs.call, inputs.float_inputs, size, inputs.device, out=outputs)
        moments = _moments(block, inputs, specs, hidden, size)
    else:
        moments = _moments(block, inputs, specs, inputs.float_inputs, settings.batch_size, outputs)
    layers = {}
    for done, (name, spec) in enumerate(specs.items(), 1):
        weight = weight_of(modules[name])
        layers[name] = searched_rounding.run(weight, spec, moments[name].mean(), name, keep_size=settings.keep_size)
        inputs.report(done / len(specs))
    return BlockResult(layers, note=_note(block, moments))


def _note(block: nn.Module, moments: Mapping[str, _Moment]) -> str:
    """What must be said of experts; empty where all had enough tokens."""
    counted = [
        (moment.count, len(moment.sum))
        for name, module in block.named_modules()
        if isinstance(module, Experts)
        for number, expert in enumerate(module.experts())
        if (moment := moments.get(f"{name}.{number}.{expert.entries[0]}")) is not None
    ]
    few = sum(count < _ENOUGH * width for count, width in counted)
    none = sum(not count for count, _ in counted)
    unseen = f", {none} by none, whose inputs weigh alike" if none else ""
    return f"{few} of {len(counted)} experts are reached by few tokens{unseen}" if few else ""


def second_moments(
    block: nn.Module,
    inputs: BlockInputs,
    names: Iterable[str],
    hidden: Tensor,
    batch_size: int,
) -> dict[str, Tensor]:
    """Mean square of what enters each linear, over the positions that count.

    Args:
        block: the block, on ``inputs.device``.
        inputs: how the block is called, the mask and the device.
        names: linears, by name in the block.
        hidden: hidden states that enter the block, [samples, length, H].
        batch_size: samples at a time.

    Returns:
        float32 [K] per name, at least a ten-thousandth of its own mean; all ones for a linear that nothing reached.
    """
    found = _moments(block, inputs, names, hidden, batch_size)
    return {name: moment.mean() for name, moment in found.items()}


def _moments(
    block: nn.Module,
    inputs: BlockInputs,
    names: Iterable[str],
    hidden: Tensor,
    batch_size: int,
    outputs: Tensor | None = None,
) -> dict[str, _Moment]:
    """The same before the division, with the number of positions."""
    modules = linears(block)
    moments = {name: _Moment(weight_of(modules[name]).shape[1], inputs.device) for name in names}

    def hook(moment: _Moment, mask: Tensor) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            moment.add(args[0] if args else next(iter(kwargs.values())), mask)

        return add

    for start in range(0, len(hidden), batch_size):
        part = slice(start, start + batch_size)
        mask = inputs.mask[part].to(inputs.device)
        handles = (modules[n].register_forward_pre_hook(hook(m, mask), with_kwargs=True) for n, m in moments.items())
        with hooks(handles), torch.no_grad():
            leaving = inputs.call.run(block, hidden[part].to(inputs.device))
        if outputs is not None:
            outputs[part] = leaving
            inputs.report(0.0)
    return moments


def reads_quantized(settings: OptimalRtnSettings) -> bool:
    """Whether the inputs measured are those that come through quantized blocks."""
    return settings.quantized_inputs


class _Moment:
    """Weighted sum of squares of one linear's inputs, float64 [K]."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum = torch.zeros(width, dtype=torch.float64, device=device)
        self.count = 0.0

    def add(self, found: Tensor, mask: Tensor) -> None:
        """Take in inputs [..., K]; what is not laid out as the mask, as a routed expert's inputs are, counts whole."""
        squares = found.detach().float().square().flatten(0, -2)
        weight = mask.flatten() if mask.numel() == len(squares) else squares.new_ones(len(squares))
        self.sum += weight.to(squares.dtype) @ squares
        self.count += float(weight.sum())

    def mean(self) -> Tensor:
        """Mean square [K], float32."""
        if not self.count or not bool(self.sum.any()):
            return torch.ones_like(self.sum, dtype=torch.float32)
        mean = self.sum / self.count
        return mean.clamp(min=_LEAST_SHARE * float(mean.mean())).float()


METHOD = RoundingMethod(
    OptimalRtnSettings,
    tune_block,
    computes_float_outputs=True,
    reads_quantized=reads_quantized,
    carries=True,
)
