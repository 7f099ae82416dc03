"""Folding: per-channel factors that move from a block's norms and linears into the linears they feed, changing nothing.

For a producer whose W channels reach each consumer as they are, at most times a constant, and any positive α [W],

    producer's channel w  /  α_w        rows of a linear's weight, and bias; a norm's γ (or 1 + γ, Gemma) and bias
    consumers' column c   ·  α_m(c)     m names the channel that column reads

leaves the block's function as it was, while the consumers' weights, which get rounded, have other columns.

Pairs are found by trying, without any per-model code:

    probe     run the block with noise as the output of one norm or linear, then with that noise times a random factor
              per channel: a column of a linear's input that changed by exactly one channel's factor reads that channel.
              Finds norm -> q, k, v;  v -> o, where every head of a group reads its key-value head's channels;
              up -> down (not gate -> down: SiLU is no multiple of its input);  fc1 -> ReLU -> fc2;  fused ones by rows.
    verify    fold other random factors and run the block on hidden states: its output has to stay.  A norm that feeds a
              residual too (BERT) fails here, as does one that a router or anything else reads.

Limits: modules that run exactly once; a fused linear is tried whole, in halves, in thirds, and at its last rows where
queries, keys and values follow each other; norms outside the block are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from roundexport.errors import UnsupportedError

from .bf16_linears import float32_products
from .block_call import BlockCall
from .blocks import linears, weight_of
from .experts import Experts
from .hooks import hooks

_RANGE = 1.4  # logarithms of the factors that are tried; 0.25 to 4
_PURE = 1e-4  # a column is a multiple of what it was when this share of it, at most, is something else
_SAME = 1e-3  # an output stays when folding moves it by at most this share of what the factors alone would


@dataclass(frozen=True, eq=False)
class Pair:
    """A producer and the linears that read its channels.

    Args:
        producer: module name in the block.
        start: first row of a linear producer that takes part; 0 for a norm.
        width: W, channels.
        offset: None for a linear; else what a norm adds to its weight before it multiplies with it: 0, or 1 in Gemma.
        consumers: linear's name in the block -> channel that each of its columns reads, int64 [K].
    """

    producer: str
    start: int
    width: int
    offset: float | None
    consumers: Mapping[str, Tensor]

    def describe(self) -> str:
        """As in ``mlp.up_proj -> mlp.down_proj``."""
        return f"{self.producer} -> {', '.join(self.consumers)}"


@dataclass(frozen=True, eq=False)
class Folded:
    """Parameters of a block with factors folded in; those that no pair touches are absent.

    Args:
        weights: matrices [N, K] by the linear's name in the block.
        others: norm weights and biases by parameter name in the block.
        row_factors: what rows of a matrix were multiplied with [N], by the linear's name; 1 where it is absent.
    """

    weights: dict[str, Tensor]
    others: dict[str, Tensor]
    row_factors: dict[str, Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parameters, in the block."""
        return (*(f"{name}.weight" for name in self.weights), *self.others)


def folded(block: nn.Module, pairs: Sequence[Pair], alphas: Sequence[Tensor]) -> Folded:
    """The block's parameters with factors folded in, as a differentiable function of the factors.

    Args:
        block: the block; not changed.
        pairs: of :func:`find_pairs`.
        alphas: positive factors [W], one tensor per pair, on the block's device.
    """
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for pair, alpha in zip(pairs, alphas, strict=True):
        inverse = alpha.reciprocal()
        if pair.offset is None:
            count = len(weight_of(block.get_submodule(pair.producer)))
            ones = alpha.new_ones(count)
            factor = torch.cat([ones[: pair.start], inverse, ones[pair.start + pair.width :]])
            rows[pair.producer] = rows[pair.producer] * factor if pair.producer in rows else factor
        else:
            weight, bias = _norm_parameters(block.get_submodule(pair.producer))
            others[f"{pair.producer}.weight"] = (weight.detach() + pair.offset) * inverse - pair.offset
            if bias is not None:
                others[f"{pair.producer}.bias"] = bias.detach() * inverse
        for name, channels in pair.consumers.items():
            factor = alpha[channels.to(alpha.device)]
            columns[name] = columns[name] * factor if name in columns else factor
    weights = {}
    for name in dict.fromkeys((*rows, *columns)):
        weight = weight_of(block.get_submodule(name))
        weight = weight * columns[name] if name in columns else weight
        weights[name] = weight * rows[name][:, None] if name in rows else weight
    for name, factor in rows.items():
        added = block.get_submodule(name).bias
        if isinstance(added, Tensor):
            others[f"{name}.bias"] = added.detach() * factor
    return Folded(weights, others, rows)


def fold(block: nn.Module, pairs: Sequence[Pair], alphas: Sequence[Tensor]) -> Folded:
    """Fold factors into the block, in place.

    Args:
        block: the block.
        pairs: of :func:`find_pairs`.
        alphas: positive factors [W], one tensor per pair.

    Returns:
        What was changed.
    """
    with torch.no_grad():
        new = folded(block, pairs, alphas)
        for name, weight in new.weights.items():
            weight_of(block.get_submodule(name)).copy_(weight)
        for name, tensor in new.others.items():
            block.get_parameter(name).copy_(tensor)
    return new


def find_pairs(block: nn.Module, call: BlockCall, hidden: Tensor) -> tuple[Pair, ...]:
    """Every pair that folds exactly.

    Args:
        block: the block with its float weights; as it was when this returns.
        call: how it is called.
        hidden: hidden states [B, S, H] to try it on, on the block's device; one or two samples are enough.

    Returns:
        The pairs, in the order in which the producers run.

    Raises:
        UnsupportedError: a block of experts, whose tokens differ from those of the block.
    """
    if any(isinstance(module, Experts) for module in block.modules()):
        raise UnsupportedError("this transform is not made for mixtures of experts; leave --transform away")
    with torch.no_grad(), float32_products(block):
        order = _order(block, call, hidden)
        output = call.run(block, hidden)
        pairs: list[Pair] = []
        for position, seen in enumerate(order):
            later = [other.name for other in order[position + 1 :] if other.is_linear]
            for pair in _candidates(block, call, hidden, seen, later):
                if not _covered(pair, pairs) and _holds(block, call, hidden, output, pair):
                    pairs.append(pair)
    return tuple(pairs)


@dataclass(frozen=True, eq=False)
class _Seen:
    """A module that ran: what it was given, and the shape of what it made."""

    name: str
    is_linear: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: torch.Size


def _order(block: nn.Module, call: BlockCall, hidden: Tensor) -> list[_Seen]:
    """The block's linears and norms that run exactly once, in that order."""
    matrices, found, runs = linears(block), list[_Seen](), dict[str, int]()
    norms = [name for name, module in block.named_modules() if _is_norm(module)]

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            runs[name] = runs.get(name, 0) + 1
            if isinstance(out, Tensor):
                found.append(_Seen(name, name in matrices, args, kwargs, out.shape))

        return hook

    handles = [
        block.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True) for name in (*matrices, *norms)
    ]
    with hooks(handles):
        call.run(block, hidden)
    return [seen for seen in found if runs[seen.name] == 1]


def _is_norm(module: nn.Module) -> bool:
    """A leaf whose parameters are a vector ``weight`` and perhaps a vector ``bias``."""
    own = dict(module.named_parameters())
    return "weight" in own and own.keys() <= {"weight", "bias"} and all(p.ndim == 1 for p in own.values())


def _norm_parameters(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    own = dict(module.named_parameters())
    return own["weight"], own.get("bias")


def _norm_offset(module: nn.Module, seen: _Seen) -> float | None:
    """What the norm adds to its weight, or None where the weight is not such a factor."""
    weight, bias = _norm_parameters(module)
    factor = _factors(len(weight), weight.device, seed=2)
    expected = module(*seen.args, **seen.kwargs) * factor
    for offset in (0.0, 1.0):
        changed = {"weight": (weight + offset) * factor - offset}
        if bias is not None:
            changed["bias"] = bias * factor
        found = torch.func.functional_call(module, changed, seen.args, seen.kwargs)
        if torch.allclose(found, expected, rtol=1e-4, atol=1e-5):
            return offset
    return None


def _candidates(block: nn.Module, call: BlockCall, hidden: Tensor, seen: _Seen, later: Sequence[str]) -> Iterator[Pair]:
    """Pairs of one producer whose consumers read its channels as they are; whether nothing else does is not known."""
    module = block.get_submodule(seen.name)
    widths = {weight_of(block.get_submodule(name)).shape[1] for name in later}
    offset = None if seen.is_linear else _norm_offset(module, seen)
    if not seen.is_linear and offset is None:
        return
    rows = seen.shape[-1]
    slices = _slices(rows, widths) if seen.is_linear else ([(0, rows)] if rows in widths else [])
    if not slices:
        return
    noise = torch.randn(seen.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
    before = _inputs(block, call, hidden, seen.name, noise, later)
    for start, width in slices:
        factor, alpha = torch.ones(rows).to(hidden), _factors(width, hidden.device, seed=1)
        factor[start : start + width] = alpha
        after = _inputs(block, call, hidden, seen.name, noise * factor, later)
        consumers = {}
        for name in later:
            channels = _channels(before[name], after[name], alpha)
            if channels is not None:
                consumers[name] = channels.cpu()
        if consumers:
            yield Pair(seen.name, start, width, offset, consumers)


def _slices(rows: int, widths: set[int]) -> list[tuple[int, int]]:
    """(start, width) of rows of a linear that may be read as they are by linears with so many columns."""
    found = [(0, rows)]
    for width in sorted(widths):
        for parts in (2, 3):
            if rows == parts * width:
                found += [(part * width, width) for part in range(parts)]
        last = (rows - width) // 2  # queries, then as many keys as values
        if last > 0 and rows == width + 2 * last and width % last == 0 and last != width:
            found.append((rows - last, last))
    return found


def _factors(width: int, device: torch.device, seed: int) -> Tensor:
    """Distinct positive factors [width] in random order, the same for the same seed."""
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    return ((order + 0.5) / width * 2 - 1).mul(_RANGE).exp().to(device)


def _inputs(
    block: nn.Module, call: BlockCall, hidden: Tensor, producer: str, output: Tensor, names: Sequence[str]
) -> dict[str, Tensor]:
    """What linears read, [positions, K] each, when a producer's output is replaced."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0].reshape(-1, args[0].shape[-1])

        return hook

    replace = block.get_submodule(producer).register_forward_hook(lambda *_: output)
    with hooks([replace, *(block.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names)]):
        call.run(block, hidden)
    return seen


def _channels(before: Tensor, after: Tensor, alpha: Tensor) -> Tensor | None:
    """The channel each column reads [K], or None unless every column is one channel's multiple of what it was."""
    if torch.equal(before, after):
        return None
    power = before.square().sum(0)
    ratio = (before * after).sum(0) / power
    if not bool((after - ratio * before).norm(dim=0).le(_PURE * power.sqrt()).all()):  # NaN, of a dead column, fails
        return None
    sorted_alpha, order = alpha.sort()
    right = torch.searchsorted(sorted_alpha, ratio.contiguous()).clamp(max=len(alpha) - 1)
    left = (right - 1).clamp(min=0)
    nearest = torch.where(ratio - sorted_alpha[left] < sorted_alpha[right] - ratio, left, right)
    if not bool((sorted_alpha[nearest] / ratio - 1).abs().le(0.3 * 2 * _RANGE / len(alpha)).all()):
        return None
    return order[nearest]


def _covered(pair: Pair, pairs: Sequence[Pair]) -> bool:
    """Whether the same rows of the same producer are in a pair already."""
    return any(p.producer == pair.producer and p.start <= pair.start < p.start + p.width for p in pairs)


def _holds(block: nn.Module, call: BlockCall, hidden: Tensor, output: Tensor, pair: Pair) -> bool:
    """Whether folding leaves the block's output alone, against what the factors would do to it without consumers."""
    alpha = _factors(pair.width, hidden.device, seed=3)
    new = folded(block, [pair], [alpha])
    alone = folded(block, [Pair(pair.producer, pair.start, pair.width, pair.offset, {})], [alpha])
    spread = output.flatten(0, -2).square().mean(0).sqrt().clamp(min=torch.finfo(output.dtype).tiny)
    kept, moved = (
        ((call.run(block, hidden, found.weights, found.others) - output) / spread).norm() for found in (new, alone)
    )
    return bool(kept <= _SAME * moved)
