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

Experts are rounded one by one, each for the tokens that the router sends it (expert_tokens.py), its last linear for
what its quantized first ones give.  Those that few tokens reach are counted and told.

A group of weights that are all 0 was meant to be 0 (it was pruned): it stays exactly so, and repairs nothing.

In: a block, hidden states on both sides.  Out: codes, scales, zero points.  Limits: sums of K × K in memory, so wide
layers take 8·K² bytes; an input that no token reaches keeps the grid's nearest codes.  Sources: GPTQ, arXiv 2210.17323;
GPTAQ, arXiv 2504.02692; QEP, arXiv 2504.09629; QuantEase, arXiv 2309.01885.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor, nn

from roundexport.algorithms.common import error_compensation, sign_descent
from roundexport.algorithms.common.expert_tokens import FEW_DAMPING, ExpertTokens, TokensOfExpert
from roundexport.algorithms.common.latent_codes import LatentCodes
from roundexport.algorithms.common.output_error import shares_lost
from roundexport.algorithms.interface import BlockInputs, BlockResult, BlockSize, RoundingMethod
from roundexport.errors import RoundexportError, UsageError
from roundexport.kernels import gram
from roundexport.model.blocks import linears, weight_of
from roundexport.model.expert_names import DOWN
from roundexport.model.experts import Experts
from roundexport.model.staged_forward import StagedForward
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec

from ._gram_weight import Effort, Problem, round_weight

_POLISH_RATE = 1 / 200
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

    def effort(self) -> Effort:
        """How far to go with one weight."""
        return Effort(self.sweeps, self.searches, self.keep_size)

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
    if settings.steps and any(isinstance(module, Experts) for module in block.modules()):
        raise UsageError("steps on a block's output are not made for mixtures of experts; leave steps at 0")
    walked = _Walked()
    _walk(block, inputs, specs, settings, walked)
    cells = walked.cells
    if not settings.steps:
        layers = {**{name: cell.quantized() for name, cell in cells.items()}, **walked.experts}
        written = inputs.quantized_output_buffer is not None
        return BlockResult(
            {name: layers[name] for name in specs},
            outputs_written=written,
            layer_losses=walked.losses,
            note=walked.note(),
        )
    schedule = sign_descent.Schedule(settings.steps, settings.batch_size, dict.fromkeys(cells, _POLISH_RATE))
    return sign_descent.learn(block, inputs, cells, schedule, sign_descent.squared_error)


@dataclass(eq=False)
class _Walked:
    """What a walk through a block has found so far; experts are kept packed, as there are many."""

    cells: dict[str, LatentCodes] = field(default_factory=dict)
    experts: dict[str, QuantizedLinear] = field(default_factory=dict)
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    reached: int = 0
    few: int = 0
    none: int = 0

    def note(self) -> str:
        """What must be said of experts; empty where all had enough tokens."""
        if not self.few:
            return ""
        unseen = f", {self.none} by none" if self.none else ""
        return (
            f"{self.few} of {self.reached + self.few} experts are reached by few tokens{unseen}: other tokens stand in"
        )


def _walk(
    block: nn.Module, inputs: BlockInputs, specs: Mapping[str, QuantSpec], settings: GramSettings, found: _Walked
) -> None:
    """Every linear rounded, stage by stage, each for the inputs that those before it leave; and what each lost."""
    modules, size = linears(block), settings.batch_size
    keep = _fits(inputs, block)
    with StagedForward(
        block, inputs.call, inputs.quantized_inputs, inputs.float_inputs, size, inputs.device, keep
    ) as walk:
        for index, stage in enumerate(walk.stages):
            names = [name for name in stage if name in specs]
            if not names:
                continue
            if walk.experts(index) is not None:
                _round_experts(walk, index, inputs, specs, settings, found)
                continue
            weights = {name: weight_of(modules[name]).float() for name in names}
            problem = _problem(_sums(walk, index, inputs), weights, settings.damping)
            for name, weight in weights.items():
                found.cells[name] = _rounded(walk, name, weight, specs[name], problem, settings, found)
            inputs.report(0.5 * (index + 1) / len(walk.stages))
        walk.outputs(
            None if settings.steps else inputs.quantized_output_buffer,
            None if inputs.float_outputs_ready else inputs.target,
        )


def _rounded(
    walk: StagedForward,
    name: str,
    weight: Tensor,
    spec: QuantSpec,
    problem: Problem,
    settings: GramSettings,
    found: _Walked,
) -> LatentCodes:
    """One linear, rounded and put in the place of the float one; what it lost is noted."""
    cell = round_weight(weight, spec, problem, settings.effort(), name)
    rounded = cell.weight()
    walk.replace(name, rounded)
    if not settings.steps:  # a polish goes on, and measures the block
        lost = shares_lost(weight, rounded, problem.gram, problem.repair, damping=problem.damping, spec=spec)
        found.losses |= {} if lost is None else {name: lost}
    return cell


def _round_experts(
    walk: StagedForward,
    index: int,
    inputs: BlockInputs,
    specs: Mapping[str, QuantSpec],
    settings: GramSettings,
    found: _Walked,
) -> None:
    """Every expert of a layer, one at a time: first the linears that read its tokens, then the last one."""
    pair = walk.experts(index)
    assert pair is not None
    path = walk.stages[index][0].rsplit(".", 2)[0]
    tokens = ExpertTokens(walk.calls(index), inputs.mask)
    sides = list(zip(*(side.experts() for side in pair), strict=True))
    for number, (expert, own) in enumerate(sides):
        given = tokens.of(number)
        damping = FEW_DAMPING if given.few else settings.damping
        found.few, found.reached, found.none = (
            found.few + given.few, found.reached + (not given.few), found.none + (not given.own)
        )  # fmt: skip
        for parts in (own.entries, (DOWN,)):
            weights = {
                f"{path}.{number}.{part}": weight_of(own.get_submodule(part)).float()
                for part in parts
                if f"{path}.{number}.{part}" in specs
            }
            if not weights:
                continue
            entering = given.quantized, given.floats
            if parts == (DOWN,):
                entering = expert.inner(given.quantized), own.inner(given.floats)
            problem = _problem(_sums_of_tokens(*entering, given), weights, damping)
            for name, weight in weights.items():
                cell = _rounded(walk, name, weight, specs[name], problem, settings, found)
                found.experts[name] = cell.quantized()
        inputs.report(0.5 * (index + (number + 1) / len(sides)) / len(walk.stages))


def _sums_of_tokens(quantized: Tensor, floats: Tensor, given: TokensOfExpert) -> list[tuple[Tensor, Tensor]]:
    """H and C of an expert's tokens, and then, where it has enough of both, those of the samples that are held out."""
    apart = error_compensation.held_out(given.samples)
    if given.few or not 0 < int(apart.sum()) < len(apart):
        return [_finite(gram.run(quantized, floats, given.weights))]
    return [_finite(gram.run(quantized[part], floats[part], given.weights[part])) for part in (~apart, apart)]


def _problem(parts: list[tuple[Tensor, Tensor]], weights: Mapping[str, Tensor], damping: float) -> Problem:
    """H and the error compensation of inputs, from their sums and those of what is held out."""
    gram_sum, cross = parts[0]
    repair_damping = (
        error_compensation.choose(parts[0], parts[1], tuple(weights.values()))
        if len(parts) > 1
        else error_compensation.UNSURE
    )
    for more_gram, more_cross in parts[1:]:
        gram_sum.add_(more_gram)
        cross.add_(more_cross)
    return Problem.of(gram_sum, cross, damping, repair_damping)


def _sums(walk: StagedForward, stage: int, inputs: BlockInputs) -> list[tuple[Tensor, Tensor]]:
    """H and C of a stage's inputs, and then, where there are any, those of the samples that are held out."""
    parts: dict[bool, gram.Sums] = {}
    start = 0
    for quantized, floats in walk.inputs(stage):
        weights = inputs.weights_of(start, quantized)
        for apart, part in error_compensation.shares(start, len(quantized)):
            parts.setdefault(apart, gram.Sums(quantized)).add(quantized[part], floats[part], weights[part])
        start += len(quantized)
    if not parts:
        raise RoundexportError("there are no calibration samples")
    return [_finite(parts[apart].totals()) for apart in sorted(parts)]


def _finite(sums: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if not all(bool(torch.isfinite(part).all()) for part in sums):
        raise RoundexportError("activations that enter a linear are not finite numbers; the model is unusable")
    return sums


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


METHOD = RoundingMethod(GramSettings, tune_block, computes_float_outputs=True, carries=True)
