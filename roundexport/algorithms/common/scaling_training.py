"""What teq.py and teq_model.py share: rounding with a gradient, the training loop, the comparison at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from roundexport.algorithms.common.batches import shuffled_batches
from roundexport.algorithms.interface import Transformed
from roundexport.errors import RoundexportError, UsageError
from roundexport.kernels import fake_quant
from roundexport.model.blocks import weight_of
from roundexport.model.channel_scaling import Pair, fold, folded
from roundexport.quant.spec import QuantSpec

COMPARED_SAMPLES = 16  # on which starts and the result are compared
_WARM_UP = 0.05

Loss = Callable[[Sequence[Tensor], Tensor], Tensor]
"""Loss on the samples with these indices, as a function of log α, one tensor per pair."""


@dataclass(frozen=True)
class Steps:
    """How factors are trained: Adam with betas (0.9, 0.9), warm-up over 5 % of the steps, then linearly to 0.

    Args:
        count: steps.
        batch_size: samples per step.
        learning_rate: in log α.
        seed: of the order of samples.
        report: called after every step with the share of them that is done.
    """

    count: int
    batch_size: int
    learning_rate: float
    seed: int
    report: Callable[[float], None]


def check_steps(steps: int, batch_size: int, learning_rate: float) -> None:
    """Refuse numbers that make no sense.

    Raises:
        UsageError: one of them does not.
    """
    if steps < 0 or batch_size < 1:
        raise UsageError(f"steps must be 0 or more and batch_size 1 or more, not {steps} and {batch_size}")
    if not 0 < learning_rate <= 1:
        raise UsageError(f"learning_rate must be above 0 and at most 1, not {learning_rate}")


class FakeQuant(torch.autograd.Function):
    """Round to nearest by kernels/fake_quant.py, with a gradient: 1, or through scale and zero point as well."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, spec: QuantSpec, through_scale: bool) -> Tensor:
        """The weight [N, K] as the scheme stores it."""
        grouped = fake_quant.Grouped.of(weight, spec)
        ones = torch.ones_like(grouped.least)
        fake = fake_quant.run(grouped, torch.zeros_like(grouped.weight), ones, ones)
        ctx.kept = (grouped, fake) if through_scale else None
        rounded: Tensor = fake.weight.view(weight.shape)
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The gradient in the weight, straight through the rounding."""
        if ctx.kept is None:
            return gradient, None, None
        grouped, fake = ctx.kept
        ones = torch.ones_like(grouped.least)
        shaped = gradient.reshape(grouped.weight.shape)
        offset, low, high = fake_quant.gradients(grouped, fake, shaped, ones, ones)
        found = offset / fake.scale
        for extreme, part in (
            (grouped.least, low),
            (grouped.largest, high),
        ):  # part is the gradient in it, times itself
            at = (grouped.weight - extreme).abs().argmin(-1, keepdim=True)
            found.scatter_add_(-1, at, torch.where(extreme == 0, 0, part / extreme))
        return found.view(gradient.shape), None, None


@dataclass(frozen=True, eq=False)
class Rounded:
    """A block's parameters with factors folded in and weights rounded: what :meth:`BlockCall.run` takes."""

    weights: dict[str, Tensor]
    others: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        block: nn.Module,
        pairs: Sequence[Pair],
        thetas: Sequence[Tensor],
        specs: Mapping[str, QuantSpec],
        through_scale: bool,
    ) -> Rounded:
        """Evaluate.

        Args:
            block: the float block.
            pairs: its pairs.
            thetas: logarithms of their factors.
            specs: scheme by the linear's name; others are not rounded.
            through_scale: let gradients through scales and zero points.
        """
        new = folded(block, pairs, [theta.exp() for theta in thetas])
        weights = dict(new.weights)
        for name, spec in specs.items():
            weight = weights[name] if name in weights else weight_of(block.get_submodule(name))
            weights[name] = FakeQuant.apply(weight, spec, through_scale)  # type: ignore[no-untyped-call]
        return cls(weights, new.others)

    def parameters(self, block: nn.Module, prefix: str) -> dict[str, Tensor]:
        """The same by parameter name, as the modules store them."""
        found = {f"{prefix}{name}": tensor for name, tensor in self.others.items()}
        for name, weight in self.weights.items():
            turned = isinstance(block.get_submodule(name), Conv1D)
            found[f"{prefix}{name}.weight"] = weight.t() if turned else weight
        return found


def useful(pairs: Sequence[Pair], specs: Mapping[str, QuantSpec]) -> list[Pair]:
    """Pairs that change at least one weight with a scheme."""
    return [pair for pair in pairs if not specs.keys().isdisjoint((pair.producer, *pair.consumers))]


def mean(loss: Loss, thetas: Sequence[Tensor], chosen: Tensor, batch_size: int) -> float:
    """Loss over the chosen samples, without gradients."""
    with torch.no_grad():
        parts = [(len(part), loss(thetas, part).item()) for part in torch.split(chosen, batch_size)]
    return sum(size * value for size, value in parts) / len(chosen)


def train(loss: Loss, start: Sequence[Tensor], samples: int, steps: Steps) -> list[Tensor]:
    """Log α after all steps.

    Args:
        loss: what is minimized.
        start: log α at the start, one tensor per pair.
        samples: number of samples that batches are drawn from.
        steps: how many, how large.
    """
    thetas = [theta.clone().requires_grad_() for theta in start]
    optimizer = torch.optim.Adam(thetas, steps.learning_rate, betas=(0.9, 0.9))
    cycle, warm_up = shuffled_batches(samples, steps.batch_size, steps.seed), max(1, round(_WARM_UP * steps.count))
    for step in range(steps.count):
        left = (steps.count - step) / max(1, steps.count - warm_up)
        optimizer.param_groups[0]["lr"] = steps.learning_rate * min((step + 1) / warm_up, left, 1.0)
        optimizer.zero_grad()
        gradients = torch.autograd.grad(loss(thetas, next(cycle)), thetas)
        for theta, gradient in zip(thetas, gradients, strict=True):
            theta.grad = gradient
        optimizer.step()
        steps.report((step + 1) / steps.count)
    return [theta.detach() for theta in thetas]


def best(
    candidates: Sequence[list[Tensor]], measure: Callable[[list[Tensor]], float]
) -> tuple[list[Tensor], float, float]:
    """The candidate of least loss (the first of equal ones), the loss of the first candidate, and the least loss."""
    losses = [measure(candidate) for candidate in candidates]
    if not all(loss < float("inf") for loss in losses):  # NaN fails this too
        raise RoundexportError(f"the loss is not a finite number: {losses}; the model's weights are unusable")
    chosen = min(range(len(candidates)), key=losses.__getitem__)
    return candidates[chosen], losses[0], losses[chosen]


def fold_in(
    block: nn.Module, pairs: Sequence[Pair], thetas: Sequence[Tensor], specs: Mapping[str, QuantSpec]
) -> Transformed:
    """Fold factors into a block."""
    moved = [(pair, theta.exp()) for pair, theta in zip(pairs, thetas, strict=True) if bool(theta.any())]
    new = fold(block, [pair for pair, _ in moved], [alpha for _, alpha in moved])
    quantized = {f"{name}.weight" for name in specs}
    changed = {name: block.get_parameter(name).detach().clone() for name in new.names if name not in quantized}
    return Transformed(changed, new.row_factors)
