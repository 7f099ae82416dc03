"""SignRoundV2: SignRound from a searched grid, with one coefficient per group and a loss that ignores outliers.

At 2 and 3 bits the min-max grid is a poor start: its scale can be 1.5 times too large, and sign steps of 1/steps add up
to half a unit, too little to correct that.  So the grid is searched first.  Per group, with h the mean squares of the
layer's inputs in the float model and f16 rounding to the stored dtype:

    start         s₀, z = the grid of least Σ h·(ŵ - w)² (kernels/grid_search.py), s₀ stretched so that outputs keep
                  their size (optimal_rtn.py); the stretch lowers the KL after 60 steps by 8 % (sample model, 2 bits)
    symmetric     s = f16(s₀·c), c in [0, 2], 1 at the start      z = 2**(bits-1); s₀ may be negative
    asymmetric    the same, and z stays that of the search
    both          code = clamp(round(w / s + V), -z, L - z) + z,  ŵ = (code - z)·s,  L = 2**bits - 1

V and c are learned as SignRound learns V, α and β (sign_descent.py).  Gradients, straight through the rounding, with
g = ∂loss/∂ŵ, M where the clamp does not bind:

    ∂V = g·s·M        ∂c = s₀·Σ g·((code - z) - M·w/s)         0 where the smallest scale binds

    loss          symmetric below 4 bits: of a batch's output errors the largest thousandth counts as zero; otherwise a
                  few huge activations decide every sign
    rate          1/steps; 2/steps for layers of at most 3 bits when there are 1000 steps or more
    kept          the start, the best or the last step: the one of least squared error on the same samples

In: a block, its hidden states.  Out: codes, scales, zero points.  Limits: as SignRound's.  The asymmetric form is not
in the paper, which leaves asymmetric schemes to SignRound.  Source: arXiv 2512.04746; auto-round 0.16.1,
algorithms/quantization/sign_roundv2 (its search has one sign of the scale, no refit and no stretch).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from roundexport.algorithms.common import sign_descent
from roundexport.algorithms.interface import BlockInputs, BlockResult, RoundingMethod
from roundexport.kernels import fake_quant, grid_search, searched_rounding, stored_scales
from roundexport.model.blocks import linears, weight_of
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec

from . import optimal_rtn

_FILTERED = 1e-3  # share of the output's elements whose error is left out of the loss
_LARGEST_COEFFICIENT = 2.0


@dataclass(frozen=True)
class SignRoundV2Settings(sign_descent.SignDescentSettings):
    """Steps, batch size, and a first step of 1 or 2 / steps, by the header's rule, unless another is given."""

    def forward_passes(self, samples: int) -> float:
        """Those of the loop, and one per sample for the second moments of the inputs."""
        return super().forward_passes(samples) + samples

    def rtn_equivalents(self) -> float:
        """Those of the loop, and the search of the grid."""
        return super().rtn_equivalents() + 20.0

    def rate(self, spec: QuantSpec) -> float:
        """Size of the first step for a layer."""
        if self.learning_rate is not None:
            return self.learning_rate
        return (2 if self.steps >= 1000 and spec.bits <= 3 else 1) / self.steps


def tune_block(
    block: nn.Module, inputs: BlockInputs, specs: Mapping[str, QuantSpec], settings: SignRoundV2Settings
) -> BlockResult:
    """Search the grids of a block's linears, then learn their rounding.

    Args:
        block: the block with its float weights, on ``inputs.device``; not changed.
        inputs: hidden states and target.
        specs: scheme by the linear's name in the block.
        settings: steps and batch size.

    Returns:
        The quantized weights, and the loss of rounding to nearest on the searched grid and of what was learned, over
        the same samples.

    Raises:
        SpecError: a scheme does not fit its weight, or inputs are not finite.
        RoundexportError: the loss is not a finite number.
    """
    modules = linears(block)
    importance = optimal_rtn.second_moments(block, inputs, specs, inputs.float_inputs, settings.batch_size)
    roundings = {n: _Rounding(weight_of(modules[n]), spec, importance[n], n) for n, spec in specs.items()}
    rates = {name: settings.rate(spec) for name, spec in specs.items()}
    schedule = sign_descent.Schedule(settings.steps, settings.batch_size, rates)
    outliers = any(spec.symmetric and spec.bits < 4 for spec in specs.values())
    loss = filtered_error if outliers else sign_descent.squared_error
    return sign_descent.learn(block, inputs, roundings, schedule, loss, compared=sign_descent.squared_error)


def filtered_error(block: nn.Module, inputs: BlockInputs, weights: Mapping[str, Tensor], batch: Tensor) -> Tensor:
    """Mean squared error of the block's output, the largest thousandth of the elements that count taken as zero."""
    error, count = sign_descent.masked_error(block, inputs, weights, batch)
    squares = error.square().flatten()
    dropped = int(_FILTERED * float(count))
    if dropped:
        squares = squares.index_fill(0, squares.detach().topk(dropped, sorted=False).indices, 0.0)
    return squares.sum() / count


@dataclass(frozen=True, eq=False)
class _State:
    """V and c of one linear at one step."""

    rounding_offset: Tensor
    coefficient: Tensor


class _Rounding:
    """One linear's weight, its searched grid, and the two tensors that are learned for it."""

    def __init__(self, weight: Tensor, spec: QuantSpec, importance: Tensor, where: str) -> None:
        self.grouped = fake_quant.Grouped.of(weight.float(), spec, where)
        scale, self.zero = (t[..., None] for t in grid_search.search(weight, spec, importance))
        self.start = searched_rounding.stretched(self.grouped, scale, self.zero, importance)
        self.smallest = fake_quant.SMALLEST_SCALE[spec.scale_dtype]
        self.rounding_offset = torch.zeros_like(self.grouped.weight)
        self.coefficient = torch.ones_like(self.start)
        self.fake = self._evaluate()

    def weight(self) -> Tensor:
        """ŵ at the present point, [N, K]."""
        self.fake = self._evaluate()
        return self.fake.weight.view(len(self.grouped.weight), -1)

    def step(self, gradient: Tensor, size: float) -> None:
        """Move by ``size`` against the sign of the loss's gradient in V and c, given its gradient in ŵ."""
        offset_gradient, coefficient_gradient = self._gradients(gradient.view_as(self.grouped.weight))
        self.rounding_offset.sub_(offset_gradient.sign_(), alpha=size)
        self.grouped.hold_zeros(self.rounding_offset)
        self.coefficient.sub_(coefficient_gradient.sign_(), alpha=size).clamp_(0, _LARGEST_COEFFICIENT)

    def state(self) -> _State:
        """A copy of the present point."""
        return _State(self.rounding_offset.clone(), self.coefficient.clone())

    def restore(self, state: _State) -> None:
        """Go back to a point."""
        self.rounding_offset, self.coefficient = state.rounding_offset, state.coefficient

    def quantized(self) -> QuantizedLinear:
        """The integers of the last :meth:`weight`."""
        quantized: QuantizedLinear = fake_quant.to_quantized(self.grouped, self.fake)
        return quantized

    def _evaluate(self) -> fake_quant.Fake:
        with torch.no_grad():
            wanted = self.start * self.coefficient
            scale = stored_scales.stored(wanted, self.grouped.spec)
            unclamped = (self.grouped.weight / scale).add_(self.rounding_offset).round_()
            centered = torch.maximum(torch.minimum(unclamped, self.grouped.spec.max_code - self.zero), -self.zero)
            free = (wanted.abs() >= self.smallest).float()
            return fake_quant.Fake(centered * scale, centered, unclamped, scale, self.zero, free)

    def _gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """∂V [N, G, group] and ∂c [N, G, 1]."""
        fake = self.fake
        with torch.no_grad():
            through = gradient * (fake.centered_codes == fake.unclamped)
            scale_gradient = torch.sum(
                gradient * fake.centered_codes - through * self.grouped.weight / fake.scale, -1, keepdim=True
            )
            return through.mul_(fake.scale), scale_gradient * self.start * fake.free


METHOD = RoundingMethod(SignRoundV2Settings, tune_block)
