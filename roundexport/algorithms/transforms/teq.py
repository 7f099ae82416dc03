"""TEQ, trainable equivalent transformation: scale channels so that weights round better, at no cost at run time.

Every pair of channel_scaling.py, producer -> consumers, gets one positive factor α per channel.  The consumers' columns
are multiplied by it and the producer's rows divided by it.  The float block still computes the same function; the
rounding error of its weights changes.

    θ = log α                 trained, and nothing else: 0.1 % of the parameters
    ŵ = Q(fold(w, exp θ))     round to nearest, kernels/fake_quant.py; ∂ŵ/∂w = 1 and, unless switched off, the gradient
                              through a group's extremes into its scale and zero point
    loss                      mean squared error of the block's output: inputs of the quantized prefix, float target
    θ ← Adam(θ, ∂loss/∂θ)     warm-up over 5 % of the steps, then linearly down to 0

Start: for one pair after another, α = mean|x|^p with geometric mean 1 and the p of least loss from a list, as in AWQ.
At the end three candidates are compared on fixed samples: α = 1, the start, and the trained factors; the best is folded
into the weights.  The published method trains all blocks at once on the model's loss (teq_model.py).  Here one block is
in memory at a time, and its inputs contain the errors of the blocks before it.

In: a float block, hidden states, schemes.  Out: the block with other weights, and the norms and biases that changed,
for the artifact's overrides.  Any rounding method can follow.
Source: arXiv 2310.10944; the start: arXiv 2306.00978.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from roundexport.algorithms.common.scaling_training import (
    COMPARED_SAMPLES,
    Rounded,
    Steps,
    best,
    check_steps,
    fold_in,
    mean,
    train,
    useful,
)
from roundexport.algorithms.interface import BlockInputs, BlockSize, BlockTransform, Transformed
from roundexport.calibration.evenly_spread import evenly_spread
from roundexport.errors import UsageError
from roundexport.model.block_call import run_all
from roundexport.model.channel_scaling import Pair, find_pairs
from roundexport.model.hooks import hooks
from roundexport.quant.spec import QuantSpec

# A step with its backward pass, in forwards of its batch: CPU time on samples/model, one thread, 8 samples of 512
# tokens, 4 bits symmetric, groups of 128; 2.9 asymmetric; with 128 tokens 3.7 and 3.2.
_STEP_COST = 3.5
_PROBED_SAMPLES = 1  # used to detect pairs
_POWERS = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class TeqSettings:
    """How the factors are trained.

    Args:
        steps: steps per block; 0 folds the start.
        batch_size: samples per step.
        learning_rate: Adam's, in log α.
        start: ``grid`` or ``ones``.
        through_scale: let gradients through scales and zero points.

    Raises:
        UsageError: a value makes no sense.
    """

    steps: int = 100
    batch_size: int = 8
    learning_rate: float = 1e-2
    start: Literal["grid", "ones"] = "grid"
    through_scale: bool = True

    def __post_init__(self) -> None:
        if self.start not in ("grid", "ones"):
            raise UsageError(f"start must be grid or ones, not {self.start!r}")
        check_steps(self.steps, self.batch_size, self.learning_rate)

    def forward_passes(self, samples: int) -> float:
        """Block forwards over one sample that a block takes; a step counts as 3.5 forwards of its batch."""
        compared = min(COMPARED_SAMPLES, samples) * (3 + (1 + 4 * len(_POWERS) if self.start == "grid" else 0))
        return _STEP_COST * self.steps * min(self.batch_size, samples) + compared

    def rtn_equivalents(self) -> float:
        """Work on weights alone, in roundings of them to nearest."""
        return 1.0

    def peak_floats(self, size: BlockSize) -> float:
        """Float32 values held at most, besides the block: its weights once more."""
        return float(size.weights)


def transform_block(
    block: nn.Module, inputs: BlockInputs, specs: Mapping[str, QuantSpec], settings: TeqSettings
) -> Transformed:
    """Train the factors of a block and fold the best ones into it.

    Args:
        block: the block with its float weights, on ``inputs.device``; changed in place to an equivalent one.
        inputs: hidden states and target.
        specs: scheme by the linear's name in the block; others stay float.
        settings: steps and start.

    Returns:
        What changed other than weights in ``specs``, and the factors of rows; empty where nothing helped.

    Raises:
        SpecError: a scheme does not fit its weight.
        RoundexportError: the loss is not a finite number.
    """
    found = find_pairs(block, inputs.call, inputs.float_inputs[:_PROBED_SAMPLES].to(inputs.device))
    pairs = useful(found, specs)
    if not pairs:
        return Transformed()
    ones = [torch.zeros(pair.width, device=inputs.device) for pair in pairs]

    def loss(thetas: Sequence[Tensor], batch: Tensor) -> Tensor:
        return _block_loss(block, inputs, Rounded.of(block, pairs, thetas, specs, settings.through_scale), batch)

    def measure(thetas: Sequence[Tensor]) -> float:
        return mean(loss, thetas, compared, settings.batch_size)

    compared, start = evenly_spread(len(inputs.quantized_inputs), COMPARED_SAMPLES), ones
    if settings.start == "grid":
        start = _grid(_logarithms(block, inputs, pairs, compared), ones, measure)
    steps = Steps(settings.steps, settings.batch_size, settings.learning_rate, inputs.seed, inputs.report)
    trained = train(loss, start, len(inputs.quantized_inputs), steps)
    return fold_in(block, pairs, best([ones, start, trained], measure)[0], specs)


def _block_loss(block: nn.Module, inputs: BlockInputs, rounded: Rounded, batch: Tensor) -> Tensor:
    """Mean squared error of the block's output over the positions that count."""
    device = inputs.device
    mask = inputs.mask[batch].to(device)[..., None]
    found = inputs.call.run(block, inputs.quantized_inputs[batch].to(device), rounded.weights, rounded.others)
    error = (found - inputs.target[batch].to(device)) * mask
    return error.square().sum() / (mask.sum().clamp(min=1) * found.shape[-1])


def _grid(
    directions: Sequence[Tensor], start: Sequence[Tensor], measure: Callable[[list[Tensor]], float]
) -> list[Tensor]:
    """Per pair, one after another, the multiple of its direction with the least loss."""
    chosen = list(start)
    least = measure(chosen)
    for index, direction in enumerate(directions):
        for power in _POWERS:
            trial = [*chosen[:index], power * direction, *chosen[index + 1 :]]
            value = measure(trial)
            if value < least:
                chosen, least = trial, value
    return chosen


def _logarithms(block: nn.Module, inputs: BlockInputs, pairs: Sequence[Pair], chosen: Tensor) -> list[Tensor]:
    """Log mean|x| per channel of each pair, of mean 0; what the first consumer reads, over the chosen samples."""
    sizes: dict[str, Tensor] = {}
    readers = {next(iter(pair.consumers)) for pair in pairs}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            size = args[0].abs().flatten(0, -2).mean(0)
            sizes[name] = sizes[name] + size if name in sizes else size

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(keep(name)) for name in sorted(readers)]
    with hooks(handles):
        run_all(block, inputs.call, inputs.quantized_inputs[chosen], 8, inputs.device)
    found = []
    for pair in pairs:
        name, channels = next(iter(pair.consumers.items()))
        total = torch.zeros(pair.width, device=inputs.device).index_add_(0, channels.to(inputs.device), sizes[name])
        logarithm = total.clamp(min=1e-4 * float(total.max())).log()
        found.append(logarithm - logarithm.mean())
    return found


METHOD = BlockTransform(TeqSettings, transform_block)
