"""SignRound: learn, block by block, which way each weight rounds, by steps along the sign of the gradient.

For every linear of a block three tensors are learned (kernels/fake_quant.py has the formulas): the rounding offset V,
one per weight, which moves a weight up to half a step before it is rounded, and the clip coefficients α and β in
[0, 1], one pair per group, which narrow the group's range.  The loss is the squared error of the whole block's output:

    X    hidden states that reach the block through what is quantized already
    X_f  hidden states that reach it in the float model          target = block(X_f), computed once
    for i in 0 … steps-1:
        batch = the next samples of a shuffled cycle
        loss  = mean over positions that count of (block with ŵ(V, α, β) (X[batch]) - target[batch])²
        keep V, α, β if this is the least loss so far
        p ← p - lr·(1 - i/steps)·sign(∂loss/∂p)       for V, α, β;  α and β clamped to [0, 1]

The inputs come from the quantized prefix and the target from the float prefix, so each block corrects errors of the
blocks before it.  With lr = 1/steps the decaying steps add up to about 0.5, so V moves at most half a code either way.
Only signs of gradients are used.  The scale of the loss therefore does not matter, and there is no optimizer state.

The loss of a step is that of one mini-batch, so the best step is a noisy choice.  At the end the start (round to
nearest), the best step and the last one are compared on the same samples, and the best of the three is kept.

In: a block, its hidden states.  Out: the codes, scales and zero points that the last forward used, not rounded again.
Limits: at 2 bits the start matters and this start is plain; gradients flow through the whole block, so activations of
one batch must fit in memory.  Source: Cheng et al., arXiv 2309.05516; auto-round 0.16.1, sign_round/quantizer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from roundexport.algorithms.common import sign_descent
from roundexport.algorithms.interface import BlockInputs, BlockResult, RoundingMethod
from roundexport.kernels import fake_quant
from roundexport.model.blocks import linears, weight_of
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec


@dataclass(frozen=True)
class SignRoundSettings(sign_descent.SignDescentSettings):
    """Steps, batch size, and a first step of 1 / steps unless another is given."""


def tune_block(
    block: nn.Module, inputs: BlockInputs, specs: Mapping[str, QuantSpec], settings: SignRoundSettings
) -> BlockResult:
    """Learn the rounding of a block's linears.

    Args:
        block: the block with its float weights, on ``inputs.device``; not changed.
        inputs: hidden states and target.
        specs: scheme by the linear's name in the block.
        settings: steps and batch size.

    Returns:
        The quantized weights, and the loss of rounding to nearest and of what was learned, over the same samples.

    Raises:
        SpecError: a scheme does not fit its weight.
        RoundexportError: the loss is not a finite number.
    """
    modules = linears(block)
    roundings = {name: _Rounding(weight_of(modules[name]), spec, name) for name, spec in specs.items()}
    rate = settings.learning_rate or 1 / settings.steps
    schedule = sign_descent.Schedule(settings.steps, settings.batch_size, dict.fromkeys(specs, rate))
    return sign_descent.learn(block, inputs, roundings, schedule, sign_descent.squared_error)


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

    def step(self, gradient: Tensor, size: float) -> None:
        """Move by ``size`` against the sign of the loss's gradient in V, α and β, given its gradient in ŵ."""
        gradients = fake_quant.gradients(
            self.grouped, self.fake, gradient.view_as(self.grouped.weight), self.min_scale, self.max_scale
        )
        for tensor, tensor_gradient in zip(
            (self.rounding_offset, self.min_scale, self.max_scale), gradients, strict=True
        ):
            tensor.sub_(tensor_gradient.sign_(), alpha=size)
        self.grouped.hold_zeros(self.rounding_offset)
        self.min_scale.clamp_(0, 1)
        self.max_scale.clamp_(0, 1)

    def state(self) -> _State:
        """A copy of the present point."""
        return _State(self.rounding_offset.clone(), self.min_scale.clone(), self.max_scale.clone())

    def restore(self, state: _State) -> None:
        """Go back to a point."""
        self.rounding_offset, self.min_scale, self.max_scale = state.rounding_offset, state.min_scale, state.max_scale

    def quantized(self) -> QuantizedLinear:
        """The integers of the last :meth:`weight`."""
        quantized: QuantizedLinear = fake_quant.to_quantized(self.grouped, self.fake)
        return quantized

    def _evaluate(self) -> fake_quant.Fake:
        return fake_quant.run(self.grouped, self.rounding_offset, self.min_scale, self.max_scale)


METHOD = RoundingMethod(SignRoundSettings, tune_block)
