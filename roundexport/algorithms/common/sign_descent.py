"""The loop that SignRound and SignRoundV2 share: steps along the sign of a gradient, block by block.

    for i in 0 … steps-1:
        batch = the next samples of a shuffled cycle
        loss  = squared error of the block's output on the batch
        keep the point if this is the least loss so far
        p ← p - rate·(1 - i/steps)·sign(∂loss/∂p)       for all that is learned
    at the end, compare the start, the best and the last point on the same samples; keep the one of least loss

The method decides what is learned and how a weight follows from it: a :class:`Rounding` per linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from roundexport.algorithms.common.batches import shuffled_batches
from roundexport.algorithms.interface import BlockInputs, BlockResult, BlockSize
from roundexport.calibration.evenly_spread import evenly_spread
from roundexport.errors import RoundexportError, UsageError
from roundexport.quant.quantized_linear import QuantizedLinear

STEP_COST = 2.8  # a step with its backward pass, in forwards of its batch; measured on the sample model
COMPARED_SAMPLES = 32  # on which the start, the best and the last step are compared
RTN_EQUIVALENTS = 5.0  # of all weights, at the start and to compare; those of the steps are in STEP_COST
_WEIGHT_COPIES = (
    8  # what is learned: now, at the start and at the best step; ŵ, its steps twice; gradients; temporaries
)
_KEPT_PER_OUTPUT = 4  # float32 values that autograd and the next operations keep per output of a linear and token

Loss = Callable[[nn.Module, BlockInputs, Mapping[str, Tensor], Tensor], Tensor]


class Rounding(Protocol):
    """What is learned of one linear."""

    def weight(self) -> Tensor:
        """ŵ at the present point, [N, K]."""

    def step(self, gradient: Tensor, size: float) -> None:
        """Move by ``size`` against the sign of the gradients that follow from ∂loss/∂ŵ [N, K]."""

    def state(self) -> Any:
        """A copy of the present point."""

    def restore(self, state: Any) -> None:
        """Go back to a point."""

    def quantized(self) -> QuantizedLinear:
        """The integers of the last :meth:`weight`."""


@dataclass(frozen=True)
class Schedule:
    """How long and how far to step.

    Args:
        steps: sign steps.
        batch_size: samples per step.
        rates: size of the first step by the linear's name in the block.
    """

    steps: int
    batch_size: int
    rates: Mapping[str, float]


@dataclass(frozen=True)
class SignDescentSettings:
    """Settings of a method that is this loop and nothing else, and what the loop costs.

    Args:
        steps: sign steps per block.
        batch_size: samples per step.
        learning_rate: size of the first step; None: 1 / steps, unless the method's header says otherwise.

    Raises:
        UsageError: a value is not positive, or the learning rate is above 1.
    """

    steps: int = 200
    batch_size: int = 8
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise UsageError(f"steps and batch_size must be at least 1, not {self.steps} and {self.batch_size}")
        if self.learning_rate is not None and not 0 < self.learning_rate <= 1:
            raise UsageError(f"learning_rate must be above 0 and at most 1, not {self.learning_rate}")

    def forward_passes(self, samples: int) -> float:
        """Block forwards over one sample that tuning a block takes."""
        return forward_passes(self.steps, self.batch_size, samples)

    def rtn_equivalents(self) -> float:
        """Work on weights alone, in roundings of all of them to nearest."""
        return RTN_EQUIVALENTS

    def peak_floats(self, size: BlockSize) -> float:
        """Float32 values held at most, besides the block."""
        return peak_floats(self.batch_size, size)


def forward_passes(steps: int, batch_size: int, samples: int) -> float:
    """Block forwards over one sample that the loop takes; a step counts as 2.8 forwards of its batch."""
    return STEP_COST * steps * min(batch_size, samples) + 3 * min(COMPARED_SAMPLES, samples)


def peak_floats(batch_size: int, size: BlockSize) -> float:
    """Float32 values held at most beside the block."""
    return _WEIGHT_COPIES * size.weights + _KEPT_PER_OUTPUT * size.outputs * batch_size * size.length


def learn(
    block: nn.Module,
    inputs: BlockInputs,
    roundings: Mapping[str, Rounding],
    schedule: Schedule,
    loss: Loss,
    compared: Loss | None = None,
) -> BlockResult:
    """Run the loop.

    Args:
        block: the block with its float weights, on ``inputs.device``; not changed.
        inputs: hidden states and target.
        roundings: what is learned, by the linear's name in the block; at its start.
        schedule: steps, batch size, rates.
        loss: what the steps minimize, on a batch of samples.
        compared: what the points are compared by at the end; None: ``loss``.

    Returns:
        The quantized weights, and ``compared`` at the start and at the point kept, over the same samples.

    Raises:
        RoundexportError: the loss is not a finite number.
    """
    start = {name: rounding.state() for name, rounding in roundings.items()}
    best, best_loss = start, float("inf")
    cycle = shuffled_batches(len(inputs.quantized_inputs), schedule.batch_size, inputs.seed)
    for step in range(schedule.steps):
        weights = {name: rounding.weight().requires_grad_() for name, rounding in roundings.items()}
        found = loss(block, inputs, weights, next(cycle))
        value = found.item()
        if value < best_loss:
            best, best_loss = {name: rounding.state() for name, rounding in roundings.items()}, value
        gradients = torch.autograd.grad(found, list(weights.values()))
        for (name, rounding), gradient in zip(roundings.items(), gradients, strict=True):
            rounding.step(gradient, schedule.rates[name] * (1 - step / schedule.steps))
        del weights, found, gradients, gradient  # else they live on beside those of the next step
        inputs.report((step + 1) / schedule.steps)
    last = {name: rounding.state() for name, rounding in roundings.items()}
    return _choose(block, inputs, roundings, [start, best, last], schedule.batch_size, compared or loss)


def squared_error(block: nn.Module, inputs: BlockInputs, weights: Mapping[str, Tensor], batch: Tensor) -> Tensor:
    """Mean squared error of the block's output over the positions that count."""
    error, count = masked_error(block, inputs, weights, batch)
    return error.square().sum() / count


def masked_error(
    block: nn.Module, inputs: BlockInputs, weights: Mapping[str, Tensor], batch: Tensor
) -> tuple[Tensor, Tensor]:
    """Error of the block's output [B, S, H], 0 where a position does not count, and the number of elements that do."""
    device = inputs.device
    mask = inputs.mask[batch].to(device)[..., None]
    found = inputs.call.run(block, inputs.quantized_inputs[batch].to(device), weights)
    return (found - inputs.target[batch].to(device)) * mask, mask.sum().clamp(min=1) * found.shape[-1]


def _choose(
    block: nn.Module,
    inputs: BlockInputs,
    roundings: Mapping[str, Rounding],
    candidates: list[dict[str, Any]],
    batch_size: int,
    loss: Loss,
) -> BlockResult:
    """The best candidate on samples spread over the calibration set; the first one is the start."""
    chosen = evenly_spread(len(inputs.quantized_inputs), COMPARED_SAMPLES)
    losses = []
    for candidate in candidates:
        weights = _restored(roundings, candidate)
        with torch.no_grad():
            parts = [(len(part), loss(block, inputs, weights, part).item()) for part in torch.split(chosen, batch_size)]
        losses.append(sum(size * value for size, value in parts) / len(chosen))
    if not all(value < float("inf") for value in losses):  # NaN fails this too
        raise RoundexportError(f"the block's output error is not a finite number: {losses}; its weights are unusable")
    best = min(range(len(candidates)), key=losses.__getitem__)
    _restored(roundings, candidates[best])
    layers = {name: rounding.quantized() for name, rounding in roundings.items()}
    return BlockResult(layers, losses[0], losses[best])


def _restored(roundings: Mapping[str, Rounding], candidate: Mapping[str, Any]) -> dict[str, Tensor]:
    for name, state in candidate.items():
        roundings[name].restore(state)
    return {name: rounding.weight() for name, rounding in roundings.items()}
