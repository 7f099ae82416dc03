"""How much the model loses when one layer is quantised by one scheme: the scores that a plan of bits is made from.

For a linear y = W x with rounded weight Wq, D = W - Wq, tokens t, and g = ∂loss/∂y:

    fisher       ½·Σ_t (g_t · D x_t)² / tokens         gradient at the float model
    delta_loss   Σ over batches of Σ_ij |G ∘ D|, G = Σ_t g_t x_tᵀ         gradient with all layers at that scheme

``fisher``: KL(float ‖ quantised) has no slope at the float model, and its curvature is the Fisher matrix, the mean of
g gᵀ for labels drawn from the model's own distribution.  So one label is drawn per position, the loss is its surprise,
and the score is the layer's KL in nats per token to second order.  Scores of layers add up to the model's KL, and those
of 2 and of 8 bits are in the same unit, which the knapsack needs.  One backward pass serves all schemes.  For an
encoder, half the squared error of its last hidden states takes the place of KL, and random normal numbers that of the
drawn labels' gradient.

``delta_loss`` is SignRoundV2's, as published: first order, one backward pass per scheme, the loss being cross-entropy
of the sample itself, or an encoder's squared error against its float output.  Its unit is not the model's loss.

Measured on samples/model (28 layers, weights of optimal_rtn, groups of 128, KL on 64 windows of held-out text, ± .0002;
all layers at 3 bits, 3.19 with scales: .0196):

    choices, bits     2,4,8 at 3.0   2,4,8 at 3.19   2,3,4,8 at 3.0   2,3,4,8 at 3.19
    fisher               .0208           .0157            .0170            .0123
    delta_loss           .0211           .0153            .0165            .0127

The plans are equally good.  ``fisher`` is the default for what it says, KL (its sum foretold these four within 8 %),
and for its price.  With weights whose errors all point one way, as a grid of least error makes them, errors of layers
do not add up and both scores mislead: outputs must keep their size, as optimal_rtn's do.

Memory: one block of weights with its graph at a time.

    forward    no graph; the input of every block is kept, float32 [n, S, H] each
    output     norm and lm_head on the last hidden states, the loss, its slope in them, one sample at a time
    backward   blocks in reverse: run again with a graph, slope of the output in, slope of the input out; hooks on the
               linears see x and g

lm_head is scored like any linear where it is asked for: its inputs and slopes are seen on the way through the output.
A linear that no token reached, as a routed expert's, gets the mean score of those of its shape.
Source: Cheng et al. 2025, SignRoundV2, arXiv 2512.04746 (delta_loss, replay by block); Kunstner et al. 2019,
arXiv 1905.12558 (why labels must be drawn from the model).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .algorithms import optimal_rtn
from .blockcalls import BlockCall, capture_calls, first_hidden
from .blocks import linears, weight_of
from .errors import UnsupportedError, UsageError
from .outputs import is_encoder, output_of
from .settings import Scoring
from .spec import QuantSpec
from .streaming import Weights

Options = Mapping[str, Sequence[QuantSpec]]  # schemes to score, by module path
Seen = Callable[[str, Tensor, Tensor], None]  # a linear's path, its inputs [T, K], the slope of its outputs [T, N]
_OutputLoss = Callable[[Tensor, slice], Tensor]  # the model's output for some samples, which ones -> their loss


@dataclass(frozen=True, eq=False)
class Settings:
    """How layers are scored.

    Args:
        method: ``fisher`` or ``delta_loss``.
        batch_size: samples that go through a block at a time.
        seed: of the labels that are drawn.
        device: where blocks are computed.
        report: called with the share of the work that is done, 0 to 1.

    Raises:
        UsageError: an unknown method, or batch_size is not positive.
    """

    method: Scoring = "fisher"
    batch_size: int = 8
    seed: int = 42
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    report: Callable[[float], None] = lambda done: None

    def __post_init__(self) -> None:
        if self.method not in get_args(Scoring):
            raise UsageError(f"unknown way to score layers {self.method!r}; known: {', '.join(get_args(Scoring))}")
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {self.batch_size}")


@dataclass(frozen=True)
class Scores:
    """What :func:`score` finds.

    Args:
        losses: one number per scheme by layer, at least 0; less is better.
        sharing: layers that read the very same input, as query, key and value do; those that share with none are left
            out.
    """

    losses: dict[str, tuple[float, ...]]
    sharing: tuple[tuple[str, ...], ...]


def score(weights: Weights, ids: Tensor, options: Options, settings: Settings | None = None) -> Scores:
    """Score every scheme of every layer.

    Args:
        weights: the float model; not changed.
        ids: token ids [n, S].
        options: schemes by module path of linears in the blocks, and of lm_head; as many for every layer, or one where
            it is settled.
        settings: how.

    Returns:
        The scores, and which layers share an input.

    Raises:
        UnsupportedError: the model cannot be run block by block.
        SpecError: a scheme does not fit its layer.
    """
    settings = settings or Settings()
    with opened(weights, ids, settings) as model, torch.no_grad():
        model.head = next((name for name in options if name == model.head_name), None)
        moments = model.forward()
        if settings.method == "fisher":
            found = _fisher(model, options, moments)
        else:
            found = _delta_loss(model, options, moments)
    losses = _fill_unseen(found, {name: _shape(weights, name) for name in options})
    return Scores(losses, tuple(names for names in model.sharing.values() if len(names) > 1))


def _fisher(model: Replay, options: Options, moments: Mapping[str, Tensor]) -> dict[str, list[float] | None]:
    found: dict[str, list[float] | None] = dict.fromkeys(options)
    errors: dict[str, list[Tensor]] = {}

    def take(path: str, weight: Tensor) -> None:
        # Half the memory, and a relative error of 1/256 of a difference is nothing.
        errors[path] = [
            (weight - _rounded(weight, spec, moments[path], path)).bfloat16() for spec in options.get(path, ())
        ]

    def begin(block: nn.Module, prefix: str) -> None:
        errors.clear()
        for name, module in linears(block).items():
            take(f"{prefix}.{name}", weight_of(module))

    def seen(path: str, x: Tensor, slope: Tensor) -> None:
        terms = [float(((x @ error.float().t()) * slope).sum(1).square().sum()) for error in errors[path]]
        before = found.get(path) or [0.0] * len(terms)
        if path in found:
            found[path] = [a + b / (2 * model.ids.numel()) for a, b in zip(before, terms, strict=True)]

    if model.head is not None:
        take(model.head, model.head_weight())
    model.backward(model.output_slope(model.drawn_loss(), seen), seen, begin)
    return found


def _delta_loss(model: Replay, options: Options, moments: Mapping[str, Tensor]) -> dict[str, list[float] | None]:
    found: dict[str, list[float] | None] = dict.fromkeys(options)
    floats = model.outputs() if model.encoder else None
    for number in range(max(map(len, options.values()), default=0)):
        chosen = {path: specs[min(number, len(specs) - 1)] for path, specs in options.items()}
        replaced = _Replaced(chosen, moments)
        model.forward(replaced)
        sums: dict[str, float] = {}

        def seen(path: str, x: Tensor, slope: Tensor, replaced: _Replaced = replaced, sums: Any = sums) -> None:
            if path in replaced.errors:
                change = ((slope.t() @ x) * replaced.errors[path]).abs().sum()
                sums[path] = sums.get(path, 0.0) + float(change)

        slope = model.output_slope(model.true_loss(floats), seen, replaced)
        model.backward(slope, seen, None, replaced)
        for path, value in sums.items():
            if number < len(options[path]):
                found[path] = [*(found[path] or []), value]
    return found


def _fill_unseen(
    found: Mapping[str, list[float] | None], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[float, ...]]:
    """Scores of all layers: those that no token reached get the mean of their shape."""
    seen: dict[tuple[int, ...], list[list[float]]] = {}
    for path, values in found.items():
        if values is not None:
            seen.setdefault(shapes[path], []).append(values)
    result = {}
    for path, values in found.items():
        if values is None:
            alike = seen.get(shapes[path])
            if alike is None:
                raise UnsupportedError(f"{path}: no token reaches it, nor any layer of its shape; give it a rule")
            values = [mean(column) for column in zip(*alike, strict=True)]  # noqa: PLW2901  (the mean in its place)
        result[path] = tuple(values)
    return result


class _Replaced:
    """Rounded weights in place of a block's own, made when the block's turn comes."""

    def __init__(self, chosen: Mapping[str, QuantSpec], moments: Mapping[str, Tensor]) -> None:
        self.errors: dict[str, Tensor] = {}
        self._chosen, self._moments = chosen, moments

    def of(self, block: nn.Module, prefix: str) -> dict[str, Tensor]:
        """The block's rounded weights by the linear's name; ``errors`` holds their differences by path."""
        self.errors.clear()
        modules = {name: module for name, module in linears(block).items() if f"{prefix}.{name}" in self._chosen}
        return {name: self.take(f"{prefix}.{name}", weight_of(module)) for name, module in modules.items()}

    def take(self, path: str, weight: Tensor) -> Tensor:
        """One weight, rounded; ``errors`` gets its difference."""
        rounded = _rounded(weight, self._chosen[path], self._moments[path], path)
        self.errors[path] = weight - rounded
        return rounded


class Replay:
    """A model run forward and backward one block at a time; made by :func:`opened`.

    Args:
        weights: the model.
        ids: token ids [n, S].
        calls: how each block is called.
        settings: batch size, seed, device.

    Attributes:
        encoder: the model gives hidden states, not logits.
        head_name: module path of lm_head; None where there is none.
        head: the same, where it is to be scored.
        sharing: layers by the input they read, once :meth:`forward` has run.
    """

    def __init__(self, weights: Weights, ids: Tensor, calls: Sequence[BlockCall], settings: Settings) -> None:
        self.ids = ids
        self.encoder = is_encoder(weights.model)
        self._head: Any = weights.model.get_output_embeddings()  # type: ignore[operator]
        found = (name for name, module in weights.model.named_modules() if module is self._head)
        self.head_name = None if self._head is None else next(found)
        self.head: str | None = None
        self._weights, self._calls, self._settings = weights, calls, settings
        self.sharing: dict[tuple[int, int], tuple[str, ...]] = {}
        self._inputs: list[Tensor] = []  # of the linears of a block, in its first batch
        self._states: list[Tensor] = []
        self._rest: tuple[Any, ...] | None = None  # what a block returns beside hidden states
        self._generator = torch.Generator().manual_seed(settings.seed)

    def forward(self, replaced: _Replaced | None = None) -> dict[str, Tensor]:
        """Run all blocks and keep what enters each; gives the mean square of every linear's inputs, [K] by path."""
        stack, size, device = self._weights.stack, self._settings.batch_size, self._settings.device
        self._states = [first_hidden(self._weights.model, stack, self.ids, size)]
        moments: dict[str, Tensor] = {}
        for index in range(len(stack.blocks)):
            prefix = stack.block_name(index)
            with self._weights.block(index, device) as block, ExitStack() as hooks:
                weights = None if replaced is None else replaced.of(block, prefix)
                hooks.callback(block.register_forward_hook(self._note_rest).remove)
                if replaced is None:
                    for name, module in linears(block).items():
                        width = weight_of(module).shape[1]
                        moments[f"{prefix}.{name}"] = torch.zeros(width, dtype=torch.float64, device=device)
                        hook = self._looking(index, f"{prefix}.{name}", moments[f"{prefix}.{name}"])
                        hooks.callback(module.register_forward_hook(hook).remove)
                    self._inputs = []
                parts = [
                    self._calls[index].run(block, part.to(device), weights).cpu()
                    for part in torch.split(self._states[-1], size)
                ]
            self._states.append(torch.cat(parts))
            self._settings.report(0.2 * (index + 1) / len(stack.blocks))
        if self.head is not None and replaced is None:
            moments[self.head] = torch.zeros(self.head_weight().shape[1], dtype=torch.float64)
            total = moments[self.head]

            def add(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
                total.add_(args[0].flatten(0, -2).square().sum(0))

            handle = self._head.register_forward_hook(add)
            self.outputs()
            handle.remove()
        return {path: _importance(total) for path, total in moments.items()}

    def head_weight(self) -> Tensor:
        """Weight of lm_head [V, H], which is in memory."""
        return weight_of(self._head)

    def outputs(self) -> Tensor:
        """The model's output for the last hidden states, without slopes."""
        with output_of(self._weights.model, self._weights.stack, self._rest) as run:
            singles = (slice(n, n + 1) for n in range(len(self.ids)))
            return torch.cat([run(self._states[-1][part], self.ids[part], {}) for part in singles])

    def output_slope(self, loss: _OutputLoss, seen: Seen, replaced: _Replaced | None = None) -> Tensor:
        """Slope of a loss of the model's output in the last hidden states, [n, S, H].

        Args:
            loss: of the output.
            seen: gets the inputs and slopes of lm_head, sample by sample, where it is scored.
            replaced: lm_head's weight in place of its own, where it is scored.
        """
        slope, parameters = torch.empty_like(self._states[-1]), dict[str, Tensor]()
        if self.head is not None and replaced is not None:
            parameters[f"{self.head}.weight"] = replaced.take(self.head, self.head_weight())
        with ExitStack() as held:
            run = held.enter_context(output_of(self._weights.model, self._weights.stack, self._rest))
            if self.head is not None:
                held.callback(self._head.register_forward_hook(_watching(self.head, seen)).remove)
            for number in range(len(self.ids)):
                part = slice(number, number + 1)
                hidden = self._states[-1][part].clone().requires_grad_()
                with torch.enable_grad():
                    loss(run(hidden, self.ids[part], parameters), part).backward()  # type: ignore[no-untyped-call]
                assert hidden.grad is not None
                slope[part] = hidden.grad
        return slope

    def drawn_loss(self) -> _OutputLoss:
        """Surprise of labels drawn from the model's own distribution; an encoder's output times normal numbers."""

        def loss(output: Tensor, _: slice) -> Tensor:
            if self.encoder:
                return torch.sum(output * torch.randn(output.shape, generator=self._generator))
            logs = torch.log_softmax(output[:, :-1].float(), -1).flatten(0, 1)
            labels = torch.multinomial(logs.detach().exp(), 1, generator=self._generator)
            return -logs.gather(1, labels).sum()

        return loss

    def true_loss(self, floats: Tensor | None) -> _OutputLoss:
        """Cross-entropy of the samples themselves; an encoder's squared error against its float output."""

        def loss(output: Tensor, part: slice) -> Tensor:
            if floats is not None:
                return torch.sum((output - floats[part]).square())
            return nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), self.ids[part, 1:].flatten())

        return loss

    def backward(
        self,
        slope: Tensor,
        seen: Seen,
        begin: Callable[[nn.Module, str], None] | None = None,
        replaced: _Replaced | None = None,
    ) -> Tensor:
        """Replay the blocks in reverse.

        Args:
            slope: of the loss in the last hidden states, [n, S, H]; overwritten.
            seen: gets every linear's inputs and slopes, batch by batch.
            begin: called with each block and its path before it is replayed.
            replaced: weights in place of the blocks' own, as in :meth:`forward`.

        Returns:
            The slope in the first block's input.
        """
        stack, size, device = self._weights.stack, self._settings.batch_size, self._settings.device
        for index in reversed(range(len(stack.blocks))):
            prefix = stack.block_name(index)
            with self._weights.block(index, device) as block, ExitStack() as hooks:
                weights = None if replaced is None else replaced.of(block, prefix)
                if begin is not None:
                    begin(block, prefix)
                for name, module in linears(block).items():
                    hooks.callback(module.register_forward_hook(_watching(f"{prefix}.{name}", seen)).remove)
                for part, out in zip(torch.split(self._states[index], size), torch.split(slope, size), strict=True):
                    hidden = part.to(device, copy=True).requires_grad_()
                    with torch.enable_grad():
                        torch.autograd.backward(self._calls[index].run(block, hidden, weights), out.to(device))
                    assert hidden.grad is not None
                    out.copy_(hidden.grad)
            self._settings.report(1 - 0.8 * index / len(stack.blocks))
        return slope

    def _looking(self, index: int, path: str, total: Tensor) -> Callable[..., None]:
        """Hook that adds up squares of a linear's inputs, and notes who else reads the same tensor."""

        def hook(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
            total.add_(args[0].flatten(0, -2).square().sum(0))
            if not any(path in names for names in self.sharing.values()):
                self._inputs.append(args[0])  # kept, so that no other tensor gets its place
                key = index, next(n for n, known in enumerate(self._inputs) if known is args[0])
                self.sharing[key] = (*self.sharing.get(key, ()), path)

        return hook

    def _note_rest(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self._rest = output[1:] if isinstance(output, tuple) else None


@contextmanager
def opened(weights: Weights, ids: Tensor, settings: Settings) -> Iterator[Replay]:
    """A model ready to be replayed: of its tables, what these ids need of the embedding, and lm_head, are in memory.

    Args:
        weights: the model.
        ids: token ids [n, S].
        settings: batch size, seed, device.
    """
    with weights.tables(ids):
        with weights.passing():
            calls = capture_calls(weights.model, weights.stack, ids)
        yield Replay(weights, ids, calls, settings)


def _rounded(weight: Tensor, spec: QuantSpec, importance: Tensor, where: str) -> Tensor:
    rounded = optimal_rtn.quantize(weight, spec, importance, where)
    return torch.from_numpy(rounded.dequantize()).to(weight.device)


def _watching(path: str, seen: Seen) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach()
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda slope: seen(path, x.flatten(0, -2), slope.flatten(0, -2))
        )

    return hook


def _importance(total: Tensor) -> Tensor:
    """Sums of squares [K] as the grid search takes them: no channel without any weight."""
    return total.clamp(min=1e-4 * float(total.mean())).float() if bool(total.any()) else torch.ones_like(total).float()


def _shape(weights: Weights, path: str) -> tuple[int, ...]:
    return tuple(weight_of(weights.model.get_submodule(path)).shape)
