"""SignRound: learn, block by block, which way each weight rounds, by steps along the sign of the gradient.

For every linear of a block three tensors are learned (kernels/fake_quant.py has the formulas): the rounding offset V,
one per weight, which moves a weight up to half a step before it is rounded, and the clip coefficients α and β in
[0, 1], one pair per group, which narrow the group's range.  The loss is the squared error of the whole block's output:

    X    hidden states that reach the block through what is quantised already
    X_f  hidden states that reach it in the float model          target = block(X_f), computed once
    for i in 0 … steps-1:
        batch = the next samples of a shuffled cycle
        loss  = mean over positions that count of (block with ŵ(V, α, β) (X[batch]) - target[batch])²
        keep V, α, β if this is the least loss so far
        p ← p - lr·(1 - i/steps)·sign(∂loss/∂p)       for V, α, β;  α and β clamped to [0, 1]

Inputs of the quantised prefix with the float prefix as target let each block repair what the blocks before it broke.
With lr = 1/steps the decaying steps add up to about 0.5, so V crosses at most half a code either way.  Only signs are
used, so the size of the loss, and of the step along any axis, does not matter: no optimiser state, no tuning of rates.

The least loss was seen on one mini-batch each, which makes the best step a noisy choice.  So the start (round to
nearest), the best step and the last one are compared at the end on the same samples, and the best of the three is kept.

In: a block, its hidden states.  Out: the codes, scales and zero points that the last forward used, not rounded again.
Limits: at 2 bits the start matters and this start is plain; slopes flow through the whole block, so activations of
one batch must fit in memory.  Source: Cheng et al., arXiv 2309.05516; auto-round 0.16.1, sign_round/quantizer.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from roundexport.blocks import BlockInputs, BlockResult, linears, weight_of
from roundexport.errors import RoundexportError, UsageError
from roundexport.kernels import fake_quant
from roundexport.spec import QuantSpec

NEEDS_CALIBRATION = True
_STEP_COST = 2.8  # a step with its backward pass, in forwards of its batch; measured on the sample model
_COMPARED_SAMPLES = 32  # on which the start, the best and the last step are compared


@dataclass(frozen=True)
class Settings:
    """How SignRound steps.

    Args:
        steps: sign steps per block.
        batch_size: samples per step.
        learning_rate: size of the first step; None: 1 / steps.

    Raises:
        UsageError: a value is not positive.
    """

    steps: int = 200
    batch_size: int = 8
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise UsageError(f"steps and batch_size must be at least 1, not {self.steps} and {self.batch_size}")
        if self.learning_rate is not None and not 0 < self.learning_rate <= 1:
            raise UsageError(f"learning_rate must be above 0 and at most 1, not {self.learning_rate}")

    def cost(self, samples: int) -> float:
        """Block forwards over one sample that tuning a block takes; a step counts as 2.8 forwards of its batch."""
        return _STEP_COST * self.steps * min(self.batch_size, samples) + 3 * min(_COMPARED_SAMPLES, samples)


def tune_block(
    block: nn.Module, inputs: BlockInputs, specs: Mapping[str, QuantSpec], settings: Settings
) -> BlockResult:
    """Learn the rounding of a block's linears.

    Args:
        block: the block with its float weights, on ``inputs.device``; not changed.
        inputs: hidden states and target.
        specs: scheme by the linear's name in the block.
        settings: steps and batch size.

    Returns:
        The quantised weights, and the loss of rounding to nearest and of what was learned, over the same samples.

    Raises:
        SpecError: a scheme does not fit its weight.
        RoundexportError: the loss is not a finite number.
    """
    modules = linears(block)
    roundings = {name: _Rounding(weight_of(modules[name]), spec, name) for name, spec in specs.items()}
    start = {name: rounding.state() for name, rounding in roundings.items()}
    best, best_loss = start, float("inf")
    rate = settings.learning_rate or 1 / settings.steps
    batches = _batches(len(inputs.quantised), settings.batch_size, inputs.seed)
    for step in range(settings.steps):
        weights = {name: rounding.weight().requires_grad_() for name, rounding in roundings.items()}
        loss = _loss(block, inputs, weights, next(batches))
        value = loss.item()
        if value < best_loss:
            best, best_loss = {name: rounding.state() for name, rounding in roundings.items()}, value
        slopes = torch.autograd.grad(loss, list(weights.values()))
        for rounding, slope in zip(roundings.values(), slopes, strict=True):
            rounding.step(slope, rate * (1 - step / settings.steps))
        inputs.report((step + 1) / settings.steps)
    last = {name: rounding.state() for name, rounding in roundings.items()}
    return _choose(block, inputs, roundings, [start, best, last], settings.batch_size)


@dataclass(frozen=True, eq=False)
class _State:
    """V, α and β of one linear at one step."""

    rounding_offset: Tensor
    min_scale: Tensor
    max_scale: Tensor


class _Rounding:
    """One linear's weight and the three tensors that are learned for it."""

    def __init__(self, weight: Tensor, spec: QuantSpec, where: str) -> None:
        self.grouped = fake_quant.Grouped.of(weight.float(), spec, where)
        self.rounding_offset = torch.zeros_like(self.grouped.weight)
        self.min_scale = torch.ones_like(self.grouped.least)
        self.max_scale = torch.ones_like(self.grouped.least)
        self.fake = self._evaluate()

    def weight(self) -> Tensor:
        """ŵ at the present point, [N, K]."""
        self.fake = self._evaluate()
        weight: Tensor = self.fake.weight.view(len(self.grouped.weight), -1)
        return weight

    def step(self, slope: Tensor, size: float) -> None:
        """Move by ``size`` against the sign of the loss's slope in V, α and β, given its slope in ŵ."""
        slopes = fake_quant.gradients(
            self.grouped, self.fake, slope.view_as(self.grouped.weight), self.min_scale, self.max_scale
        )
        for tensor, tensor_slope in zip((self.rounding_offset, self.min_scale, self.max_scale), slopes, strict=True):
            tensor.sub_(tensor_slope.sign_(), alpha=size)
        self.min_scale.clamp_(0, 1)
        self.max_scale.clamp_(0, 1)

    def state(self) -> _State:
        """A copy of the present point."""
        return _State(self.rounding_offset.clone(), self.min_scale.clone(), self.max_scale.clone())

    def restore(self, state: _State) -> None:
        """Go back to a point."""
        self.rounding_offset, self.min_scale, self.max_scale = state.rounding_offset, state.min_scale, state.max_scale

    def _evaluate(self) -> fake_quant.Fake:
        return fake_quant.run(self.grouped, self.rounding_offset, self.min_scale, self.max_scale)


def _batches(samples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Sample indices of one step after another: all samples in random order, shuffled anew when too few are left."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, samples)
    while True:
        order = torch.randperm(samples, generator=generator)
        for start in range(0, samples - size + 1, size):
            yield order[start : start + size]


def _loss(block: nn.Module, inputs: BlockInputs, weights: Mapping[str, Tensor], batch: Tensor) -> Tensor:
    """Mean squared error of the block's output over the positions that count."""
    device = inputs.device
    mask = inputs.mask[batch].to(device)[..., None]
    found = inputs.call.run(block, inputs.quantised[batch].to(device), weights)
    error = (found - inputs.target[batch].to(device)) * mask
    return error.square().sum() / (mask.sum().clamp(min=1) * found.shape[-1])


def _choose(
    block: nn.Module,
    inputs: BlockInputs,
    roundings: Mapping[str, _Rounding],
    candidates: list[dict[str, _State]],
    batch_size: int,
) -> BlockResult:
    """The best candidate on samples spread over the calibration set; the first one is the start."""
    count = min(_COMPARED_SAMPLES, len(inputs.quantised))
    chosen = torch.linspace(0, len(inputs.quantised) - 1, count).round().long()
    losses = []
    for candidate in candidates:
        weights = _restored(roundings, candidate)
        with torch.no_grad():
            parts = [
                (len(part), _loss(block, inputs, weights, part).item()) for part in torch.split(chosen, batch_size)
            ]
        losses.append(sum(size * loss for size, loss in parts) / count)
    if not all(loss < float("inf") for loss in losses):  # NaN fails this too
        raise RoundexportError(f"the block's output error is not a finite number: {losses}; its weights are unusable")
    best = min(range(len(candidates)), key=losses.__getitem__)
    _restored(roundings, candidates[best])
    layers = {name: fake_quant.to_quantized(rounding.grouped, rounding.fake) for name, rounding in roundings.items()}
    return BlockResult(layers, losses[0], losses[best])


def _restored(roundings: Mapping[str, _Rounding], candidate: Mapping[str, _State]) -> dict[str, Tensor]:
    for name, state in candidate.items():
        roundings[name].restore(state)
    return {name: rounding.weight() for name, rounding in roundings.items()}
