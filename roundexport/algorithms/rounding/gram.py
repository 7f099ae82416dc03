"""Gram space: round every linear for the inputs it will get, from two sums over the calibration tokens.

A linear with weight W [N, K] should give, on its inputs x̂ through what is quantized already, what W gives on the float
model's inputs x.  Over all tokens that objective needs no tokens, only H = Σ x̂ᵀx̂ and C = Σ x̂ᵀ(x - x̂), K × K each:

    Σ ‖x̂ Ŵᵀ - x Wᵀ‖²  =  tr (Ŵ - T) H (Ŵ - T)ᵀ + constant        T = W + W Cᵀ H⁻¹

T is W plus a correction for the errors of earlier layers, regularized on held-out samples (error_compensation.py).  For
rounding, H gets `damping` times its mean diagonal, because new tokens use directions in which these tokens have almost
no energy.  The linears of a block are rounded stage by stage (model/staged_forward.py): each stage gets the inputs that
the quantized stages before it produce.  For each weight:

    grid      scale and zero point per group, searched for T's error weighted by diag H        (kernels/grid_search.py)
    start     GPTQ: columns in turn, later columns compensate the error of each                (kernels/gptq.py)
    descend   every code to its best given all the others, scales refitted in closed form      (kernels/gram_descent.py)
    again     per group: a new grid search for the group's optimum given all the others, kept where it is better

The loss is exact and sums over all tokens at once: no batches, no steps, no rates, nothing sampled.  A block costs one
forward on either side, 3.2·K² operations per token and input for the sums, and seconds for the rest.

    size      scales of a row stretched by t H tᵀ / ŵ H tᵀ, so that its output keeps its size

The last step is needed because a least-squares fit is shorter than its target, and these losses multiply over layers.
Optionally, sign steps on the whole block's output follow (signround.py).  They start from these codes and gain 2 % of
KL at 2 bits for as much time again, so no recipe uses them.

A group of weights that are all 0 was meant to be 0 (it was pruned): it stays exactly so, and repairs nothing.

In: a block, hidden states on both sides.  Out: codes, scales, zero points.  Limits: sums of K × K in memory, so wide
layers take 8·K² bytes; an input that no token reaches keeps the grid's nearest codes.  Sources: GPTQ, arXiv 2210.17323;
GPTAQ, arXiv 2504.02692; QEP, arXiv 2504.09629; QuantEase, arXiv 2309.01885.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

from roundexport.algorithms.common import error_compensation, sign_descent
from roundexport.algorithms.common.latent_codes import LatentCodes
from roundexport.algorithms.common.output_error import shares_lost
from roundexport.algorithms.interface import BlockInputs, BlockResult, BlockSize, RoundingMethod
from roundexport.errors import RoundexportError, UsageError
from roundexport.kernels import cholesky, gptq, gram, gram_descent, grid_search, stored_scales
from roundexport.model.blocks import linears, weight_of
from roundexport.model.staged_forward import StagedForward
from roundexport.quant.spec import QuantSpec

_POLISH_RATE = 1 / 200
_SIZED_BITS = 3  # KL 5 % better at 2 bits, level at 3, 2 % worse at 4, where little is lost
_SWEEPS_BEFORE = 2  # before a new grid search, which moves many codes again
_SUMS_COST = 1.2  # Gram sums of a token, in forwards of a block
_RTN_EQUIVALENTS = 180.0  # grid, GPTQ and descent of a weight, in roundings of it to nearest
_WEIGHT_COPIES = 3  # the block that is quantized, the positions of its codes, their start
_SQUARES = 8  # matrices of K × K: two sums twice, the damped one, its factor and inverse, the repair


@dataclass(frozen=True)
class GramSettings:
    """How far to go.

    Args:
        damping: added to H's diagonal for rounding, as a share of its mean.
        sweeps: most sweeps of a descent over all groups; it ends early when few codes move.  Two, before a search.
        searches: how often the grid is searched again, with a descent after each.
        keep_size: at 2 and 3 bits, scale rows up so that outputs keep their size.
        steps: sign steps on the block's output at the end.
        batch_size: samples that go through the block at a time, and per sign step.

    Raises:
        UsageError: a value is out of range.
    """

    damping: float = 0.3
    sweeps: int = 6
    searches: int = 1
    keep_size: bool = True
    steps: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise UsageError(f"damping must be above 0 and at most 1, not {self.damping}")
        for name in ("sweeps", "searches"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.steps < 0 or self.batch_size < 1:
            raise UsageError(f"steps must be at least 0 and batch_size at least 1: {self.steps}, {self.batch_size}")

    def forward_passes(self, samples: int) -> float:
        """Block forwards over one sample that tuning a block takes beside one on either side."""
        return _SUMS_COST * samples + (
            sign_descent.forward_passes(self.steps, self.batch_size, samples) if self.steps else 0
        )

    def rtn_equivalents(self) -> float:
        """Work on weights alone, in roundings of them to nearest."""
        return _RTN_EQUIVALENTS

    def peak_floats(self, size: BlockSize) -> float:
        """Float32 values held at most beside the block."""
        held = _waiting(size)
        if size.max_bytes is not None and 4 * (held + size.weights) > size.max_bytes:
            held = held / size.samples * self.batch_size
        polish = sign_descent.peak_floats(self.batch_size, size) if self.steps else 0.0
        return max(_WEIGHT_COPIES * size.weights + _SQUARES * size.widest**2 + held, polish)


def tune_block(
    block: nn.Module, inputs: BlockInputs, specs: Mapping[str, QuantSpec], settings: GramSettings
) -> BlockResult:
    """Round a block's linears.

    Args:
        block: the block with its float weights, on ``inputs.device``; not changed.
        inputs: hidden states.
        specs: scheme by the linear's name in the block; linears without one stay float.
        settings: how far to go.

    Returns:
        The quantized weights.  Losses are shares of each linear's output energy (output_error.py), or, where a polish
        runs, of the block's output.

    Raises:
        SpecError: a scheme does not fit its weight.
        UnsupportedError: a linear does not run exactly once in a forward of the block.
        RoundexportError: a loss is not a finite number.
    """
    cells, losses = _walk(block, inputs, specs, settings)
    if not settings.steps:
        layers = {name: cell.quantized() for name, cell in cells.items()}
        written = inputs.quantized_output_buffer is not None
        return BlockResult(layers, outputs_written=written, layer_losses=losses)
    schedule = sign_descent.Schedule(settings.steps, settings.batch_size, dict.fromkeys(cells, _POLISH_RATE))
    return sign_descent.learn(block, inputs, cells, schedule, sign_descent.squared_error)


def _walk(
    block: nn.Module, inputs: BlockInputs, specs: Mapping[str, QuantSpec], settings: GramSettings
) -> tuple[dict[str, LatentCodes], dict[str, tuple[float, float]]]:
    """Every linear rounded, stage by stage, each for the inputs that those before it leave; and what each lost."""
    modules, cells, size = linears(block), dict[str, LatentCodes](), settings.batch_size
    losses: dict[str, tuple[float, float]] = {}
    keep = _fits(inputs, block)
    with StagedForward(
        block, inputs.call, inputs.quantized_inputs, inputs.float_inputs, size, inputs.device, keep
    ) as walk:
        for index, stage in enumerate(walk.stages):
            names = [name for name in stage if name in specs]
            if not names:
                continue
            weights = {name: weight_of(modules[name]).float() for name in names}
            problem = _problem(walk, index, inputs, weights, settings)
            for name, weight in weights.items():
                cells[name] = round_weight(weight, specs[name], problem, settings, name)
                rounded = cells[name].weight()
                walk.replace(name, rounded)
                if not settings.steps:  # a polish goes on, and measures the block
                    sums = problem.gram, problem.repair
                    lost = shares_lost(weight, rounded, *sums, damping=settings.damping, spec=specs[name])
                    losses |= {} if lost is None else {name: lost}
            inputs.report(0.5 * (index + 1) / len(walk.stages))
        walk.outputs(
            None if settings.steps else inputs.quantized_output_buffer,
            None if inputs.float_outputs_ready else inputs.target,
        )
    return cells, losses


def _problem(
    walk: StagedForward, stage: int, inputs: BlockInputs, weights: Mapping[str, Tensor], settings: GramSettings
) -> Problem:
    """H and the error compensation of a stage's inputs."""
    parts = _sums(walk, stage, inputs)
    gram_sum, cross = parts[0]
    repair_damping = (
        error_compensation.choose(parts[0], parts[1], tuple(weights.values()))
        if len(parts) > 1
        else error_compensation.UNSURE
    )
    for more_gram, more_cross in parts[1:]:
        gram_sum.add_(more_gram)
        cross.add_(more_cross)
    return Problem.of(gram_sum, cross, settings.damping, repair_damping)


def _sums(walk: StagedForward, stage: int, inputs: BlockInputs) -> list[tuple[Tensor, Tensor]]:
    """H and C of a stage's inputs, and then, where there are any, those of the samples that are held out."""
    parts: dict[bool, gram.Sums] = {}
    start = 0
    for quantized, floats in walk.inputs(stage):
        weights = inputs.mask[start : start + len(quantized)].to(inputs.device)
        for apart, part in error_compensation.shares(start, len(quantized)):
            parts.setdefault(apart, gram.Sums(quantized)).add(quantized[part], floats[part], weights[part])
        start += len(quantized)
    if not parts:
        raise RoundexportError("there are no calibration samples")
    found = [parts[apart].totals() for apart in sorted(parts)]
    if not all(bool(torch.isfinite(sums).all()) for part in found for sums in part):
        raise RoundexportError("activations that enter a linear are not finite numbers; the model is unusable")
    return found


def _fits(inputs: BlockInputs, block: nn.Module) -> bool:
    """Whether all samples can wait inside the block at once."""
    samples, length, _ = inputs.float_inputs.shape
    waiting = 4 * _waiting(BlockSize.of(block, samples, length))
    # Without a limit, half of what is left; the result is the same either way.
    if inputs.device.type != "cpu":
        free: int = torch.accelerator.get_memory_info(inputs.device)[0]
        return waiting < free // 2
    held: int = psutil.Process().memory_info().rss
    limit: int = inputs.max_bytes or held + psutil.virtual_memory().available // 2
    return held + waiting < limit


def _waiting(size: BlockSize) -> float:
    """Float32 values that all samples hold while they wait, on both sides: residual, norm, two inputs."""
    return 2.0 * size.samples * size.length * (2 * size.hidden + 2 * size.widest)


@dataclass(frozen=True, eq=False)
class Problem:
    """What the linears of one stage have in common.

    Args:
        gram: H, damped for rounding, [K, K].
        repair: H⁻¹C, [K, K]: a weight's target is ``W + W @ repair.T``.
    """

    gram: Tensor
    repair: Tensor

    @classmethod
    def of(cls, gram_sum: Tensor, cross: Tensor, damping: float, repair_damping: float) -> Problem:
        """From H and C."""
        return cls(
            error_compensation.damped(gram_sum, damping), error_compensation.solve(gram_sum, cross, repair_damping)
        )


def round_weight(weight: Tensor, spec: QuantSpec, problem: Problem, settings: GramSettings, where: str) -> LatentCodes:
    """Round one weight [N, K] in Gram space.

    Args:
        weight: float32.
        spec: the scheme.
        problem: H and the repair, of its inputs.
        settings: how far to go.
        where: name of the weight in errors.

    Returns:
        Codes and grid, positions at the target.

    Raises:
        SpecError: the group size does not divide K.
    """
    spec.groups(weight.shape[1], where)
    target = torch.addmm(weight, weight, problem.repair.t())
    held = _zero_groups(weight, spec)
    if held is not None:
        _fill(target, held)
    scale, zero = grid_search.search(target, spec, problem.gram.diagonal())
    codes = gptq.run(target, problem.gram, scale, zero, spec.max_code)
    if held is not None:
        _fill(codes, held)
    rounding = gram_descent.Rounding(codes, scale, zero, spec.max_code, held)
    refit = spec.scale_dtype != "exponent8"  # a power of two has no neighbor that a small correction reaches
    gradient = rounding.gradient(target, problem.gram)
    first = min(settings.sweeps, _SWEEPS_BEFORE) if settings.searches else settings.sweeps
    gram_descent.run(rounding, gradient, problem.gram, first, refit)
    for _ in range(settings.searches):
        _search_again(rounding, gradient, problem.gram, spec, refit)
        gram_descent.run(rounding, gradient, problem.gram, settings.sweeps, refit)
    if settings.keep_size and refit and spec.bits <= _SIZED_BITS:
        rounding.scale.mul_(_stretch(rounding.weight(), target, problem.gram)[:, None])
    rounding.scale.copy_(stored_scales.stored(rounding.scale, spec))
    gram_descent.run(rounding, rounding.gradient(target, problem.gram), problem.gram, settings.sweeps, refit=False)
    return LatentCodes(spec, target, rounding.centered_codes, rounding.scale, rounding.zero_point)


def _zero_groups(weight: Tensor, spec: QuantSpec) -> Tensor | None:
    """Groups [N, G] of a weight that are 0 throughout; None: there are none."""
    held = weight.view(len(weight), spec.groups(weight.shape[1]), -1).eq(0).all(-1)
    return held if bool(held.any()) else None


def _fill(values: Tensor, groups: Tensor) -> None:
    """Set groups [N, G] of a matrix [N, K] to 0, in place."""
    values.view(*groups.shape, -1).masked_fill_(groups[..., None], 0.0)


def _search_again(
    rounding: gram_descent.Rounding, gradient: Tensor, gram_sum: Tensor, spec: QuantSpec, refit: bool
) -> None:
    """Per group, a new grid for the group's optimum given all the others; kept in the rows where the loss falls."""
    groups = rounding.scale.shape[1]
    width = gradient.shape[1] // groups
    whole = QuantSpec(spec.bits, None, spec.symmetric, spec.scale_dtype)
    for group in range(groups):
        part = slice(group * width, (group + 1) * width)
        corner = gram_sum[part, part].contiguous()
        now = rounding.centered_codes[:, part] * rounding.scale[:, group : group + 1]
        wanted = now - cholesky.solve(cholesky.run(corner), gradient[:, part].t()).t()
        scale, zero = grid_search.search(wanted, whole, corner.diagonal())
        codes = torch.round(wanted / scale).clamp_(-zero, spec.max_code - zero)
        other = gram_descent.Rounding(codes, scale, zero, spec.max_code)
        gram_descent.run(other, other.gradient(wanted, corner), corner, 1, refit, passes=6)
        new = other.weight()
        better = _loss(new - wanted, corner) < _loss(now - wanted, corner)
        if rounding.held is not None:
            better &= ~rounding.held[:, group]
        gradient.addmm_(torch.where(better[:, None], new - now, 0), gram_sum[part])
        rounding.centered_codes[:, part] = torch.where(
            better[:, None], other.centered_codes, rounding.centered_codes[:, part]
        )
        for kept, found in ((rounding.scale, other.scale), (rounding.zero_point, other.zero_point)):
            kept[:, group] = torch.where(better, found[:, 0], kept[:, group])


def _stretch(weight: Tensor, target: Tensor, gram_sum: Tensor) -> Tensor:
    """Factor per row [N] that gives outputs their size back."""
    towards = target @ gram_sum
    own, across = (towards * target).sum(1), (towards * weight).sum(1)
    # A row with less than half of the target left does not point along it; stretching would not help.
    return torch.where(across > 0.5 * own, own / across, torch.ones_like(own))


def _loss(error: Tensor, gram_sum: Tensor) -> Tensor:
    """Loss per row [N] of an error [N, K]."""
    return ((error @ gram_sum) * error).sum(1)


METHOD = RoundingMethod(GramSettings, tune_block, computes_float_outputs=True)
