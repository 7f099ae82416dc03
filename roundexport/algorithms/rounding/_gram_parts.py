"""The parts of which the work of gram.py consists, each as a function of an open block and an item.

    shard_sums       H, C and D of a stage's inputs over those samples of a shard that are held out, or over the others
    shard_tokens     tokens that reach a layer's experts, and what the router says of them, of a shard
    round_part       rows of a weight
    round_expert     an expert: first the linears that read its tokens, then the last one
    shard_outputs    hidden states that leave the block, of a shard

Who calls them with which items is told in algorithms/parts.py.  In, out and limits are those of gram.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from roundexport.algorithms.common import error_compensation
from roundexport.algorithms.common.error_compensation import InputSums
from roundexport.algorithms.common.expert_tokens import FEW_DAMPING, ExpertTokens, TokensOfExpert
from roundexport.algorithms.common.open_block import OpenBlock
from roundexport.algorithms.common.output_error import shares_lost
from roundexport.algorithms.interface import BlockInputs
from roundexport.algorithms.parts import RoundedRows, Shared
from roundexport.errors import RoundexportError
from roundexport.kernels import gram, two_sided
from roundexport.kernels.gram_rounding import Effort
from roundexport.model.blocks import linears, weight_of
from roundexport.model.expert_names import DOWN
from roundexport.model.staged_forward import Arguments
from roundexport.quant.spec import QuantSpec

from ._gram_problem import Problem
from ._gram_weight import round_rows, round_weight

_ROWS = 512  # looked at together


@dataclass(frozen=True)
class Shard:
    """A shard at a stage.

    Args:
        stage: number of the stage.
        samples: their numbers.
        held_out: those samples of it that are held out; else the others.
    """

    stage: int
    samples: range
    held_out: bool = False


def shard_sums(opened: OpenBlock, shard: Shard) -> Shared:
    """H on and above its diagonal, C and D of a stage's inputs over the asked part of a shard; nothing of no samples.

    The samples that are held out are kept for the second question, as a waiting forward gives its inputs but once.
    """
    key = ("held out", shard.stage, shard.samples.start)
    sums = _ShardSums()
    if shard.held_out and key in opened.kept:
        for tokens in opened.kept.pop(key):
            sums.add(*tokens)
    else:
        kept, start = [], shard.samples.start
        for quantized, floats in opened.walk.inputs(shard.stage, shard.samples):
            weights = opened.inputs.weights_of(start, quantized)
            error = opened.walk.residual_error(shard.stage, start)
            for apart, part in error_compensation.shares(start, len(quantized)):
                own, lacking = (quantized[part], floats[part], weights[part]), None if error is None else error[part]
                if apart == shard.held_out:
                    sums.add(*own, lacking)
                elif apart:
                    kept.append((*(t.clone() for t in own), None if lacking is None else lacking.clone()))
            start += len(quantized)
        if not shard.held_out:
            opened.kept[key] = kept
    return opened.share(sums.tensors())


class _ShardSums:
    """H, C and D so far; nothing where there are no tokens."""

    def __init__(self) -> None:
        self._sums: gram.Sums | None = None
        self._residual: Tensor | None = None

    def add(self, quantized: Tensor, floats: Tensor, weights: Tensor, error: Tensor | None) -> None:
        """Add tokens: x̂, x, their weights, and what the residual stream lacks where their linear writes to it."""
        self._sums = self._sums or gram.Sums(quantized)
        self._sums.add(quantized, floats, weights)
        if error is not None:
            more = (quantized * weights[..., None]).flatten(0, -2).t() @ error.flatten(0, -2)
            self._residual = more if self._residual is None else self._residual.add_(more)

    def tensors(self) -> dict[str, Tensor]:
        """By the names of :class:`InputSums`; of H what is on and above its diagonal."""
        if self._sums is None:
            return {}
        found = dict(zip(("gram", "cross"), self._sums.upper(), strict=True))
        return found if self._residual is None else {**found, "residual": self._residual}


def whole_sums(totals: Mapping[bool, dict[str, Tensor]]) -> list[InputSums]:
    """Sums over all samples, from what was added up of those that are fitted (False) and held out (True)."""
    if not totals:
        raise RoundexportError("there are no calibration samples")
    found = [totals[apart] for apart in sorted(totals)]
    return [finite(InputSums(gram.mirrored(total.pop("gram")), **total)) for total in found]


def finite(sums: InputSums) -> InputSums:
    """The sums, unless they hold values that are not finite."""
    if not all(
        bool(torch.isfinite(part[start : start + _ROWS]).all())
        for part in sums.tensors().values()
        for start in range(0, len(part), _ROWS)
    ):
        raise RoundexportError("activations that enter a linear are not finite numbers; the model is unusable")
    return sums


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a weight that are to be rounded.

    Args:
        name: of the linear in the block.
        rows: which.
        spec: the scheme.
        problem: of its inputs, shared.
        effort: how far to go.
        keeps_target: also return what was aimed at.
        fisher: S of the weight as it was measured, shared; None: rows do not look at each other.
        fisher_damping: of S.
    """

    name: str
    rows: range
    spec: QuantSpec
    problem: Shared
    effort: Effort
    keeps_target: bool
    fisher: Shared | None = None
    fisher_damping: float = 0.0


def round_part(opened: OpenBlock, part: Rows) -> RoundedRows:
    """Rows of a weight, rounded."""
    weight = weight_of(linears(opened.block)[part.name])[part.rows.start : part.rows.stop].float()
    problem = dict(part.problem.tensors())
    if "shift" in problem:
        problem["shift"] = problem["shift"][part.rows.start : part.rows.stop]
    fisher = None
    if part.fisher is not None:
        measured = part.fisher.tensors()["fisher"][part.rows.start : part.rows.stop, : len(part.rows)]
        fisher = two_sided.damped(measured.to(weight.device), part.fisher_damping)
    return round_rows(weight, part.spec, problem, part.effort, part.keeps_target, fisher)


def shard_tokens(opened: OpenBlock, shard: Shard) -> Shared:
    """What a layer's experts are called with, batch by batch."""
    found: dict[str, Tensor] = {}
    for number, (quantized, floats) in enumerate(opened.walk.calls(shard.stage, shard.samples)):
        own = zip(("tokens", "chosen", "shares", "floats"), (*quantized[:3], floats[0]), strict=True)
        found |= {f"{number:05}.{name}": tensor.detach() for name, tensor in own}
    return opened.share(found)


@dataclass(frozen=True, eq=False)
class OneExpert:
    """An expert that is to be rounded.

    Args:
        stage: number of the stage of its layer's experts.
        number: its own.
        path: name of the layer's experts in the block.
        specs: scheme by the linear's name in the block, of its own linears.
        tokens: of all shards, shared.
        damping: where it has enough tokens.
        effort: how far to go.
        measured: tell what was lost.
    """

    stage: int
    number: int
    path: str
    specs: Mapping[str, QuantSpec]
    tokens: tuple[Shared, ...]
    damping: float
    effort: Effort
    measured: bool


@dataclass(eq=False)
class RoundedExpert:
    """What became of an expert.

    Args:
        few: few tokens reach it.
        none: none do.
        layers: its linears, by name in the block.
        losses: share of the output's energy that each lost, before and after.
    """

    few: bool
    none: bool
    layers: dict[str, RoundedRows] = field(default_factory=dict)
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)


def round_expert(opened: OpenBlock, part: OneExpert) -> RoundedExpert:
    """An expert, rounded, and put in the place of the float one here."""
    pair = opened.walk.experts(part.stage)
    assert pair is not None
    expert, own = (list(side.experts())[part.number] for side in pair)
    given = _tokens(opened, part).of(part.number)
    damping = FEW_DAMPING if given.few else part.damping
    found = RoundedExpert(given.few, not given.own)
    for names in (own.entries, (DOWN,)):
        paths = {f"{part.path}.{part.number}.{name}": name for name in names}
        weights = {
            path: weight_of(own.get_submodule(name)).float() for path, name in paths.items() if path in part.specs
        }
        if not weights:
            continue
        entering = given.quantized, given.floats
        if names == (DOWN,):
            entering = expert.inner(given.quantized), own.inner(given.floats)
        problem = Problem.of(_sums_of_tokens(*entering, given), tuple(weights.values()), damping)
        for path, weight in weights.items():
            spec, tensors = part.specs[path], problem.tensors()
            rounded = round_weight(weight, spec, tensors, part.effort)
            found.layers[path] = rounded
            opened.replace({path: rounded})
            if part.measured:
                lost = _lost_by(weight, rounded.weight(), spec, tensors, problem.added)
                found.losses |= {} if lost is None else {path: lost}
    return found


@dataclass(frozen=True, eq=False)
class Losing:
    """A rounded linear of which is wanted what it lost.

    Args:
        name: of the linear in the block.
        spec: the scheme.
        problem: of its inputs, shared.
        added: to the diagonal of the problem's H.
    """

    name: str
    spec: QuantSpec
    problem: Shared
    added: float


def lost_by(opened: OpenBlock, part: Losing) -> tuple[float, float] | None:
    """What a weight's rounding lost of its outputs, to nearest and as it was done."""
    weight = weight_of(linears(opened.block)[part.name]).float()
    return _lost_by(weight, opened.walk.rounded(part.name), part.spec, part.problem.tensors(), part.added)


def _lost_by(
    weight: Tensor, rounded: Tensor, spec: QuantSpec, problem: Mapping[str, Tensor], added: float
) -> tuple[float, float] | None:
    aim = problem["gram"], problem["repair"], problem.get("shift")
    return shares_lost(weight, rounded, *aim, added=added, spec=spec)


@dataclass(frozen=True)
class Leaving:
    """Hidden states that are wanted of a shard.

    Args:
        samples: their numbers.
        quantized: those of the quantized block.
        floats: those of the float block.
    """

    samples: range
    quantized: bool
    floats: bool


def shard_outputs(opened: OpenBlock, part: Leaving) -> Shared | None:
    """Hidden states that leave the block, into their place; shared, where that is not seen by whoever asks."""
    outs = _outs(opened.inputs, part)
    opened.walk.outputs(outs.get("quantized"), outs.get("floats"), part.samples)
    if opened.apart:
        return opened.share({name: out[part.samples.start : part.samples.stop] for name, out in outs.items()})
    opened.written()
    return None


def put_outputs(inputs: BlockInputs, part: Leaving, shared: Shared | None) -> None:
    """Write hidden states that :func:`shard_outputs` shared into their place."""
    if shared is None:
        return
    outs = _outs(inputs, part)
    for name, found in shared.take().items():
        outs[name][part.samples.start : part.samples.stop] = found


def _outs(inputs: BlockInputs, part: Leaving) -> dict[str, Tensor]:
    """Where hidden states that are wanted go, of all samples."""
    outs = {"quantized": inputs.quantized_output_buffer if part.quantized else None}
    outs["floats"] = inputs.target if part.floats else None
    return {name: out for name, out in outs.items() if out is not None}


def _tokens(opened: OpenBlock, part: OneExpert) -> ExpertTokens:
    """Of a layer; gathered once in a process."""
    key = ("tokens", part.stage)
    if key not in opened.kept:
        opened.kept[key] = ExpertTokens(_calls(part.tokens), opened.inputs.mask)
    found: ExpertTokens = opened.kept[key]
    return found


def _calls(shards: tuple[Shared, ...]) -> Iterator[tuple[Arguments, Arguments]]:
    for shared in shards:
        tensors = shared.tensors()
        for number in range(len(tensors) // 4):
            own = [tensors[f"{number:05}.{name}"] for name in ("tokens", "chosen", "shares", "floats")]
            yield tuple(own[:3]), (own[3],)


def _sums_of_tokens(quantized: Tensor, floats: Tensor, given: TokensOfExpert) -> list[InputSums]:
    """H and C of an expert's tokens, and then, where it has enough of both, those of the samples that are held out."""
    apart = error_compensation.held_out(given.samples)
    if given.few or not 0 < int(apart.sum()) < len(apart):
        return [finite(InputSums(*gram.run(quantized, floats, given.weights)))]
    parts = ~apart, apart
    return [finite(InputSums(*gram.run(quantized[part], floats[part], given.weights[part]))) for part in parts]
