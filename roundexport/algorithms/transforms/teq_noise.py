"""TEQ for rounding with error compensation: factors trained on a noise model, not on rounding to nearest.

Rounding in Gram space (gram.py) chooses its own grid and compensates the error of one code in others.  Factors trained
for round-to-nearest protect channels with large activations; with gram they raise the KL by a few percent.  The error
that compensation cannot remove depends on the width of the grid and on the noise of a column given all the others.
With w' = w·α, α = exp θ per column of a pair (channel_scaling.py), and per group a step s and a middle m:

    noise   D = s²·max(1/12, (|w' - m|/s - L/2)²)        inside the grid; outside, the distance to its end
    loss    Σ over linears of (Σ h·D/α²) / (the same at the start)
            h = 1 / (H⁻¹) of the column, H = Σ x̂ᵀx̂ with damping on its diagonal
    θ, s, m ← Adam, linearly down to 0;  |θ| ≤ 1.4, mean 0

The main effect is that columns get similar ranges, so the few widest do not set the step of every row.  Tokens are
needed once, for H; training runs no forward pass.  Followed by gram on the sample model, KL falls by 1 to 3 % at 3 and
4 bits, for nearly twice the time; at 2 bits in groups of 64 there is no gain.

In: a float block, hidden states, schemes.  Out: as teq.py.  Limits: no gain before signround, which starts at round to
nearest and stays near it; for rtn use teq.  Memory: matrices of K × K for every pair.
Source: pairs, factors and folding are those of arXiv 2310.10944, whose option sqrt_w_init has the same aim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from roundexport.algorithms.common.error_compensation import damped
from roundexport.algorithms.common.scaling_training import fold_in, useful
from roundexport.algorithms.interface import BlockInputs, BlockSize, BlockTransform, Transformed
from roundexport.errors import RoundexportError, UsageError
from roundexport.kernels import cholesky
from roundexport.model.blocks import weight_of
from roundexport.model.channel_scaling import Pair, find_pairs
from roundexport.model.hooks import hooks
from roundexport.quant.spec import QuantSpec

_MOST = 1.4  # magnitude of θ; factors between 1/4 and 4
_START = 0.85  # of the step that spans a group
_SUMS_COST = 2.0  # of a token's forward and sums, in forwards of a block; measured on samples/model
_ITERATION_COST = 3.0  # of an iteration, in roundings of the weights to nearest
_WEIGHT_COPIES = 6  # w', its noise, what autograd keeps of them
_TINY = float(torch.finfo(torch.float32).tiny)
_SQUARES = 6  # matrices of K × K: one per pair, and its inverse


@dataclass(frozen=True)
class TeqNoiseSettings:
    """How the factors are trained.

    Args:
        iterations: Adam's; they take weights only, no samples.
        learning_rate: in θ, log s, and m.
        damping: added to H's diagonal, as a share of its mean.
        batch_size: samples that go through the block at a time.

    Raises:
        UsageError: a value is out of range.
    """

    iterations: int = 80
    learning_rate: float = 0.03
    damping: float = 0.3
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("learning_rate", "damping"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"{name} must be between 0 and 1, not {getattr(self, name)}")

    def forward_passes(self, samples: int) -> float:
        """Block forwards over one sample that a block takes."""
        return _SUMS_COST * samples

    def rtn_equivalents(self) -> float:
        """Work on weights alone, in roundings of them to nearest."""
        return _ITERATION_COST * self.iterations

    def peak_floats(self, size: BlockSize) -> float:
        """Float32 values held at most beside the block."""
        return float(_WEIGHT_COPIES * size.weights + _SQUARES * size.widest**2)


def transform_block(
    block: nn.Module, inputs: BlockInputs, specs: Mapping[str, QuantSpec], settings: TeqNoiseSettings
) -> Transformed:
    """Train factors for the least noise of the rounded weights, and fold them into a block.

    Args:
        block: the block with its float weights, on ``inputs.device``; changed in place to an equivalent one.
        inputs: hidden states.
        specs: scheme by the linear's name in the block; others stay float.
        settings: iterations.

    Returns:
        What changed other than weights in ``specs``, and the factors of rows; empty where nothing helped.

    Raises:
        SpecError: a scheme does not fit its weight.
        RoundexportError: the noise is not a finite number.
    """
    pairs = useful(find_pairs(block, inputs.call, inputs.float_inputs[:1].to(inputs.device)), specs)
    sources = {name: source for pair in pairs for name, source in _sources(pair, specs).items()}
    importances = _importances(block, inputs, set(sources.values()), settings)
    thetas = []
    for index, pair in enumerate(pairs):
        readers = [
            _Reader(
                weight_of(block.get_submodule(name)).detach().float(),
                channels.to(inputs.device),
                importances[sources[name]],
                specs[name],
                name,
            )
            for name, channels in pair.consumers.items()
            if name in specs
        ]
        thetas.append(_trained(pair, readers, settings, inputs.device))
        inputs.report((index + 1) / len(pairs))
    return fold_in(block, pairs, thetas, specs)


class _Reader:
    """A linear that reads a pair's channels, with the grid that the noise model gives it."""

    def __init__(self, weight: Tensor, channels: Tensor, importance: Tensor, spec: QuantSpec, where: str) -> None:
        self.weight, self.channels, self.levels = weight, channels, spec.max_code
        self.groups = spec.groups(weight.shape[1], where)
        self.importance = importance.view(self.groups, -1)
        shaped = weight.view(len(weight), self.groups, -1)
        low, high = shaped.amin(-1, keepdim=True).clamp(max=0), shaped.amax(-1, keepdim=True).clamp(min=0)
        step = ((high - low) / spec.max_code).clamp(min=1e-8)
        self.size = step.log().add(torch.tensor(_START).log()).requires_grad_()
        middle = torch.zeros_like(step) if spec.symmetric else (high + low) / 2
        self.middle = middle.requires_grad_(not spec.symmetric)

    def noise(self, theta: Tensor) -> Tensor:
        """Σ h·D/α²."""
        alpha = theta.exp()[self.channels]
        step = self.size.exp()
        away = ((self.weight * alpha).view(len(self.weight), self.groups, -1) - self.middle).abs() / step
        noise = (away - self.levels / 2).relu().square().clamp(min=1 / 12) * step.square()
        return (noise * (self.importance / alpha.square().view(self.groups, -1))).sum()

    def learned(self) -> list[Tensor]:
        """Step and middle, where they are learned."""
        return [tensor for tensor in (self.size, self.middle) if tensor.requires_grad]


def _trained(pair: Pair, readers: Sequence[_Reader], settings: TeqNoiseSettings, device: torch.device) -> Tensor:
    """θ of a pair [W], of mean 0."""
    theta = torch.zeros(pair.width, device=device)
    if not readers:
        return theta
    first = [max(float(reader.noise(theta).detach()), _TINY) for reader in readers]
    theta.requires_grad_()
    learned = [theta, *(tensor for reader in readers for tensor in reader.learned())]
    optimizer = torch.optim.Adam(learned, settings.learning_rate)
    for iteration in range(settings.iterations):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - iteration / settings.iterations)
        total = torch.stack([reader.noise(theta) / start for reader, start in zip(readers, first, strict=True)]).sum()
        if not bool(torch.isfinite(total)):
            raise RoundexportError(f"{pair.describe()}: the noise of rounding is not a finite number")
        for tensor, gradient in zip(learned, torch.autograd.grad(total, learned), strict=True):
            tensor.grad = gradient
        optimizer.step()
        with torch.no_grad():
            theta.clamp_(-_MOST, _MOST)
    found = theta.detach()
    return found - found.mean()


def _sources(pair: Pair, specs: Mapping[str, QuantSpec]) -> dict[str, str]:
    """Per consumer with a scheme, the first one that reads the channels in the same order: they share their inputs."""
    found: dict[str, str] = {}
    for name, channels in pair.consumers.items():
        if name in specs:
            same = (other for other in found if torch.equal(pair.consumers[other], channels))
            found[name] = next(same, name)
    return found


def _importances(
    block: nn.Module, inputs: BlockInputs, names: set[str], settings: TeqNoiseSettings
) -> dict[str, Tensor]:
    """Per linear named, h [K]: what is left of a column's inputs once all others are known."""
    sums: dict[str, Tensor] = {}

    def add(name: str, weights: Tensor) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = (args[0] * weights).flatten(0, -2)
            if name not in sums:
                sums[name] = rows.new_zeros(rows.shape[-1], rows.shape[-1])
            sums[name].addmm_(rows.t(), rows)

        return hook

    for part in torch.split(torch.arange(len(inputs.quantized_inputs)), settings.batch_size):
        weights = inputs.mask[part].to(inputs.device).sqrt()[..., None]
        handles = (block.get_submodule(n).register_forward_pre_hook(add(n, weights)) for n in sorted(names))
        with hooks(handles), torch.no_grad():
            inputs.call.run(block, inputs.quantized_inputs[part].to(inputs.device))
    return {name: _importance(gram, settings.damping, name) for name, gram in sums.items()}


def _importance(gram: Tensor, damping: float, where: str) -> Tensor:
    mean = float(gram.diagonal().mean())
    if not mean < float("inf"):  # NaN fails this too
        raise RoundexportError(f"{where}: activations that enter it are not finite numbers; the model is unusable")
    # The diagonal of H⁻¹ = UᵀU.
    return cholesky.inverse_factor(damped(gram, damping)).square().sum(0).reciprocal()


METHOD = BlockTransform(TeqNoiseSettings, transform_block)
