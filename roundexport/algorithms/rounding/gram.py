"""Gram space: round every linear for the inputs it will get, from a few sums over the calibration tokens.

A linear with weight W [N, K] should give, on its inputs x̂ through what is quantized already, what W gives on the float
model's inputs x.  Over all tokens that objective needs no tokens, only H = Σ x̂ᵀx̂ and C = Σ x̂ᵀ(x - x̂), K × K each:

    Σ ‖x̂ Ŵᵀ - x Wᵀ - e‖²  =  tr (Ŵ - T) H (Ŵ - T)ᵀ + constant        T = W + (C Wᵀ + D)ᵀ H⁻¹

T is W plus a correction for the errors of earlier layers, regularized on held-out samples (error_compensation.py).  A
linear that writes to the residual stream (model/residual_writers.py) also corrects what it can of the error e that the
stream has there, by a third sum, D = Σ x̂ᵀe: what all blocks before lost runs past it, and no other linear sees it.

For rounding, `damping` times the size of a usual input, (mean √H_kk)², is added to H's diagonal, because new tokens use
directions in which these tokens have almost no energy.  The plain mean would be that of a few massive inputs where a
model has them, and hide all others: in one down_proj of SmolLM2-135M it is 480 times the median, as one token of 512
has nearly all the energy.  The linears of a block are rounded stage by stage (model/staged_forward.py): each stage gets
the inputs that the quantized stages before it produce.  For each weight:

    grid      scale and zero point per group, searched for T's error weighted by diag H        (kernels/grid_search.py)
    start     GPTQ: columns in turn, later columns compensate the error of each                (kernels/gptq.py)
    descend   every code to its best given all the others, scales refitted in closed form      (kernels/gram_descent.py)
    again     per group: a new grid search for the group's optimum given all the others, kept where it is better

The loss is exact and sums over all tokens: no batches, no steps, no rates.  A block costs one
forward on either side, 3.2·K² operations per token and input for the sums, and seconds for the rest.

    size      scales of a row stretched by t H tᵀ / ŵ H tᵀ, so that its output keeps its size

The last step is needed because a least-squares fit is shorter than its target, and these losses multiply over layers.
The work is done in parts of fixed size (algorithms/parts.py): sums over shards of the samples, which are then added in
their order; rows of a weight; experts.  So the bytes do not depend on who does which part.

Optionally, rows make good each other's errors, by what an error of each output costs the model: kernels/two_sided.py,
with sums that a backward pass gives (tuning/output_fisher.py).  The recipe `best` does it: .88 of the KL on
SmolLM2-135M in twice the time.  Errors of outputs are then larger than each by itself could be, and so are the losses
that are told.

Optionally, grid and start are found group after group, for what later columns can compensate (kernels/group_start.py):
2 to 5 % less loss of a layer at 2 to 4 bits, for a tenth more work on weights.

Optionally, sign steps on the whole block's output follow (signround.py).  They start from these codes and gain 2 % of
KL at 2 bits for as much time again, so no recipe uses them.

Experts are rounded one by one, each for the tokens that the router sends it (expert_tokens.py), its last linear for
what its quantized first ones give.  Those that few tokens reach are counted and told.

A group of weights that are all 0 was meant to be 0 (it was pruned): it stays exactly so, and repairs nothing.

In: a block, hidden states on both sides.  Out: codes, scales, zero points.  Limits: sums of K × K in memory, so wide
layers take 8·K² bytes; an input that no token reaches keeps the grid's nearest codes.  Sources: GPTQ, arXiv 2210.17323;
GPTAQ, arXiv 2504.02692; QEP, arXiv 2504.09629; QuantEase, arXiv 2309.01885; SchurOpt, arXiv 2608.15567 (by
groups); LoaQ, arXiv 2509.06297 (the stream).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from torch import Tensor, nn

from roundexport.algorithms.common import sign_descent
from roundexport.algorithms.common.latent_codes import LatentCodes, pack
from roundexport.algorithms.common.open_block import LocalParts, beside, waiting
from roundexport.algorithms.interface import BlockInputs, BlockResult, BlockSize, RoundingMethod
from roundexport.algorithms.parts import MOST_FISHER_ROWS, Parts, RoundedRows, fisher_parts, row_parts, shards
from roundexport.errors import UnsupportedError, UsageError
from roundexport.kernels.gram_rounding import Effort
from roundexport.model.blocks import linears, weight_of
from roundexport.model.experts import Experts
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec

from ._gram_head import HeadRounder
from ._gram_parts import (
    Leaving,
    Losing,
    OneExpert,
    Rows,
    Shard,
    lost_by,
    put_outputs,
    round_expert,
    round_part,
    shard_outputs,
    shard_sums,
    shard_tokens,
    whole_sums,
)
from ._gram_problem import Problem

_POLISH_RATE = 1 / 200
_SUMS_COST = 1.2  # Gram sums of a token, in forwards of a block
_LEAST_DAMPING = 1e-3  # of S, of less than full rank where tokens are few: float32 has no factor of one at 1e-4
_TWO_SIDED = 3.0  # times the work on a weight, where its rows look at each other
_RTN_EQUIVALENTS = 180.0  # grid, GPTQ and descent of a weight, in roundings of it to nearest
T = TypeVar("T")


@dataclass(frozen=True)
class GramSettings:
    """How far to go.

    Args:
        damping: added to H's diagonal for rounding, as a share of a usual input's size.
        sweeps: most sweeps of a descent over all groups; it ends early when few codes move.  Two, before a search.
        searches: how often the grid is searched again, with a descent after each.
        keep_size: at 2 and 3 bits, scale rows up so that outputs keep their size.
        fisher_samples: calibration samples of 512 tokens, or as many more as are shorter, from which is measured what
            an error of each output costs the model, for rows that make good each other's errors; 0: rows do not look
            at each other.
        fisher_damping: added to that measure's diagonal, as a share of its mean.
        start: "columns", all grids and then GPTQ, or "groups", both of a group when its turn comes.
        steps: sign steps on the block's output at the end.
        batch_size: samples that go through the block at a time, and per sign step.

    Raises:
        UsageError: a value is out of range.
    """

    damping: float = 0.3
    sweeps: int = 6
    searches: int = 1
    keep_size: bool = True
    fisher_samples: int = 0
    fisher_damping: float = 0.1
    start: Literal["columns", "groups"] = "columns"
    steps: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise UsageError(f"damping must be above 0 and at most 1, not {self.damping}")
        if not self.fisher_damping >= _LEAST_DAMPING:
            raise UsageError(f"fisher_damping must be at least {_LEAST_DAMPING}, not {self.fisher_damping}")
        for name in ("sweeps", "searches", "fisher_samples"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.start not in {"columns", "groups"}:
            raise UsageError(f"start must be columns or groups, not {self.start!r}")
        if self.steps < 0 or self.batch_size < 1:
            raise UsageError(f"steps must be at least 0 and batch_size at least 1: {self.steps}, {self.batch_size}")

    def effort(self) -> Effort:
        """How far to go with one weight."""
        return Effort(self.sweeps, self.searches, self.keep_size, self.start == "groups")

    def forward_passes(self, samples: int) -> float:
        """Block forwards over one sample that tuning a block takes beside one on either side."""
        steps = sign_descent.forward_passes(self.steps, self.batch_size, samples) if self.steps else 0
        return _SUMS_COST * samples + steps

    def rtn_equivalents(self) -> float:
        """Work on weights alone, in roundings of them to nearest."""
        return _RTN_EQUIVALENTS * (_TWO_SIDED if self.fisher_samples else 1.0)

    def peak_floats(self, size: BlockSize) -> float:
        """Float32 values held at most beside the block."""
        held = waiting(size)
        if size.max_bytes is not None and 4 * (held + size.weights + beside(size)) > size.max_bytes:
            held = held / size.samples * self.batch_size
        if self.fisher_samples:  # S of the block, and what a part of rows has
            held += MOST_FISHER_ROWS * (size.outputs + 4 * min(size.outputs, MOST_FISHER_ROWS) + 4 * size.widest)
        polish = sign_descent.peak_floats(self.batch_size, size) if self.steps else 0.0
        return max(beside(size) + held, polish)


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
    if not settings.steps:
        layers = {**{name: _packed(specs[name], rows) for name, rows in walked.rounded.items()}, **walked.experts}
        written = inputs.quantized_output_buffer is not None
        return BlockResult(
            {name: layers[name] for name in specs},
            outputs_written=written,
            layer_losses=walked.losses,
            note=walked.note(),
        )
    cells = {}
    for name, rows in walked.rounded.items():
        assert rows.target is not None
        cells[name] = LatentCodes(specs[name], rows.target, rows.centered_codes(), rows.scale, rows.zero_point)
    schedule = sign_descent.Schedule(settings.steps, settings.batch_size, dict.fromkeys(cells, _POLISH_RATE))
    return sign_descent.learn(block, inputs, cells, schedule, sign_descent.squared_error)


@dataclass(eq=False)
class _Walked:
    """What a walk through a block has found so far; experts are kept packed, as there are many."""

    rounded: dict[str, RoundedRows] = field(default_factory=dict)
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
    size, samples = settings.batch_size, shards(len(inputs.mask), settings.batch_size)
    with LocalParts(block, inputs, size) if inputs.parts is None else inputs.parts(size) as parts:
        running = {name for stage in parts.stages for name in stage}
        for name in specs:
            if name not in running:
                raise UnsupportedError(
                    f"{name} never runs in a forward of its block, which reads its weight: keep it float by a rule"
                )
        for index, stage in enumerate(parts.stages):
            names = [name for name in stage if name in specs]
            done = _Share(inputs, index, len(parts.stages))
            if not names:
                continue
            if parts.has_experts(index):
                _round_experts(parts, index, samples, {name: specs[name] for name in names}, settings, found, done)
            else:
                weights = {name: weight_of(linears(block)[name]).float() for name in names}
                _round_linears(parts, index, samples, weights, specs, settings, found, done)
        wants = Leaving(
            range(0),
            quantized=not settings.steps and inputs.quantized_output_buffer is not None,
            floats=not inputs.float_outputs_ready,
        )
        leaving = [dataclasses.replace(wants, samples=shard) for shard in samples]
        for part, left in zip(leaving, parts.map(shard_outputs, leaving, _homes(leaving)), strict=True):
            put_outputs(inputs, part, left)
            inputs.report(0.5)


@dataclass(frozen=True, eq=False)
class _Share:
    """How much of the walk is done: half of the block's work where a polish follows, told as such."""

    inputs: BlockInputs
    stage: int
    stages: int

    def at(self, share: float) -> None:
        """Tell that this share of the stage is done."""
        self.inputs.report(0.5 * (self.stage + share) / self.stages)

    def through(self, results: Iterator[T], count: int, begin: float, end: float) -> Iterator[T]:
        """The results; the share goes from ``begin`` to ``end`` with them."""
        for number, result in enumerate(results, 1):
            yield result
            self.at(begin + (end - begin) * number / count)


def _round_linears(
    parts: Parts,
    stage: int,
    samples: Sequence[range],
    weights: Mapping[str, Tensor],
    specs: Mapping[str, QuantSpec],
    settings: GramSettings,
    found: _Walked,
    done: _Share,
) -> None:
    """The linears that share an input, each put in the place of the float one; what each lost is noted."""
    for name, weight in weights.items():
        specs[name].groups(weight.shape[1], name)
    sought = [Shard(stage, shard, held_out) for shard in samples for held_out in (False, True)]
    apart = [part.held_out for part in sought]
    summed = parts.map(shard_sums, sought, _homes(sought))
    sums = whole_sums(parts.total(zip(apart, done.through(summed, len(sought), 0.0, 0.5), strict=True)))
    problem = Problem.of(sums, tuple(weights.values()), settings.damping, parts)
    shared = parts.share(problem.tensors())
    measured = done.inputs.fisher
    fisher = {name: parts.share({"fisher": measured[name]}) for name in weights if name in measured}
    asked = [
        Rows(
            name, rows, specs[name], shared, settings.effort(), settings.steps > 0, fisher.get(name),
            settings.fisher_damping,
        )
        for name, weight in weights.items()
        for rows in (fisher_parts if name in fisher else row_parts)(len(weight))
    ]  # fmt: skip
    pieces: dict[str, list[RoundedRows]] = {name: [] for name in weights}
    for part, piece in zip(asked, done.through(parts.map(round_part, asked), len(asked), 0.5, 1.0), strict=True):
        pieces[part.name].append(piece)
    own = {name: RoundedRows.joined(pieces.pop(name)) for name in weights}
    parts.replace(own)
    found.rounded |= own
    if not settings.steps:  # else a polish goes on, and measures the block
        losing = [Losing(name, specs[name], shared, problem.added) for name in weights]
        for name, lost in zip(weights, parts.map(lost_by, losing), strict=True):
            found.losses |= {} if lost is None else {name: lost}
    for held in (shared, *fisher.values()):
        held.release()


def _round_experts(
    parts: Parts,
    stage: int,
    samples: Sequence[range],
    specs: Mapping[str, QuantSpec],
    settings: GramSettings,
    found: _Walked,
    done: _Share,
) -> None:
    """Every expert of a layer."""
    names = parts.stages[stage]
    path = names[0].rsplit(".", 2)[0]
    count = 1 + max(int(name.rsplit(".", 2)[1]) for name in names)
    sought = [Shard(stage, shard) for shard in samples]
    tokens = tuple(parts.map(shard_tokens, sought, _homes(sought)))
    asked = [
        OneExpert(
            stage, number, path, {name: spec for name, spec in specs.items() if name.startswith(f"{path}.{number}.")},
            tokens, settings.damping, settings.effort(), measured=not settings.steps,
        )
        for number in range(count)
    ]  # fmt: skip
    own: dict[str, RoundedRows] = {}
    for expert in done.through(parts.map(round_expert, asked), count, 0.0, 1.0):
        own |= expert.layers
        found.losses |= expert.losses
        found.experts |= {name: _packed(specs[name], rows) for name, rows in expert.layers.items()}
        found.few, found.reached, found.none = (
            found.few + expert.few, found.reached + (not expert.few), found.none + expert.none
        )  # fmt: skip
    parts.replace(own)
    for shared in tokens:
        shared.release()


def _homes(of_shards: Sequence[Shard | Leaving]) -> list[int]:
    """The same home for all that is done with a shard."""
    return [item.samples.start for item in of_shards]


def _packed(spec: QuantSpec, rows: RoundedRows) -> QuantizedLinear:
    return pack(spec, rows.centered_codes(), rows.scale, rows.zero_point)


def _fisher_samples(settings: GramSettings) -> int:
    """See :class:`RoundingMethod`."""
    return settings.fisher_samples


def _head_rounder(gram: Tensor, settings: GramSettings) -> HeadRounder:
    """See :class:`RoundingMethod`."""
    return HeadRounder(gram, settings.damping, settings.effort())


METHOD = RoundingMethod(
    GramSettings,
    tune_block,
    computes_float_outputs=True,
    carries=True,
    parted=True,
    fisher_samples=_fisher_samples,
    head_rounder=_head_rounder,
)
