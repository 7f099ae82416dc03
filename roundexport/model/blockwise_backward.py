"""A float model run forward and backward one block at a time: what every linear reads, and the gradient of its output.

    forward    no graph; the input of every block is kept, float32 [n, S, H] each
    output     norm and lm_head on the last hidden states, the loss, its gradient in them, one sample at a time
    backward   blocks in reverse: run again with a graph, gradient of the output in, gradient of the input out; hooks on
               the linears see x and g

Memory: one block of weights with its graph at a time, and what enters every block.  lm_head is seen like any linear
where it is asked for: its inputs and gradients pass by on the way through the output.  Limits: the model must run block
by block (block_call.py).  Source: the replay by block of Cheng et al. 2025, SignRoundV2, arXiv 2512.04746; Kunstner et
al. 2019, arXiv 1905.12558 (why labels must be drawn from the model).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from roundexport.errors import UsageError

from .block_call import BlockCall, capture_calls, first_hidden
from .blocks import linears, weight_of
from .head_inputs import HeadReachedError, entered, stopped_at
from .output_head import output_of
from .streamed_model import StreamedModel

Seen = Callable[[str, Tensor, Tensor], None]  # a linear's path, its inputs [T, K], the gradient of its outputs [T, N]
OutputLoss = Callable[[Tensor, slice], Tensor]  # the model's output for some samples, which ones -> their loss


@dataclass(frozen=True, eq=False)
class BackwardSettings:
    """How a model is replayed.

    Args:
        batch_size: samples that go through a block at a time.
        seed: of the labels that are drawn.
        device: where blocks are computed.
        report: called with the share of the work that is done, 0 to 1.

    Raises:
        UsageError: batch_size is not positive.
    """

    batch_size: int = 8
    seed: int = 42
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    report: Callable[[float], None] = lambda done: None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {self.batch_size}")


class Replaced(Protocol):
    """Weights in place of the model's own, made when a block's turn comes."""

    def of(self, block: nn.Module, prefix: str) -> dict[str, Tensor]:
        """Those of a block [N, K], by the linear's name."""


class BlockwiseBackward:
    """A model run forward and backward one block at a time; made by :func:`open_backward`.

    Args:
        weights: the model.
        ids: token ids [n, S].
        calls: how each block is called.
        settings: batch size, seed, device.

    Attributes:
        encoder: the model does not say what the next token is: it gives hidden states, or logits of another kind.
        head_name: module path of lm_head; None where there is none.
        head: the same, where it is to be scored.
        sharing: layers by the input they read, once :meth:`forward` has run.
    """

    def __init__(
        self, weights: StreamedModel, ids: Tensor, calls: Sequence[BlockCall], settings: BackwardSettings
    ) -> None:
        self.ids = ids
        self.encoder = weights.checkpoint.task != "generate"
        self._head: Any = weights.model.get_output_embeddings()  # type: ignore[operator]
        found = (name for name, module in weights.model.named_modules() if module is self._head)
        self.head_name = None if self._head is None else next(found)
        self.head: str | None = None
        self._weights, self._calls, self._settings = weights, calls, settings
        self.sharing: dict[tuple[int, int], tuple[str, ...]] = {}
        self._inputs: list[Tensor] = []  # of the linears of a block, in its first batch
        self._states: list[Tensor] = []
        self._before: list[Tensor] = []  # the same of the samples that only `input_sums` looks at
        self._rest: tuple[Any, ...] | None = None  # what a block returns beside hidden states
        self._generator = torch.Generator().manual_seed(settings.seed)

    def forward(self, replaced: Replaced | None = None) -> dict[str, Tensor]:
        """Run all blocks and keep what enters each; gives the mean square of every linear's inputs, [K] by path."""
        stack, size, device = self._weights.stack, self._settings.batch_size, self._settings.device
        self._before, self._states = [], [first_hidden(self._weights.model, stack, self.ids, size)]
        moments: dict[str, Tensor] = {}
        for index in range(len(stack.blocks)):
            prefix = stack.block_name(index)
            with self._weights.block(index, device) as block, ExitStack() as held:
                weights = None if replaced is None else replaced.of(block, prefix)
                held.callback(block.register_forward_hook(self._note_rest).remove)
                if replaced is None:
                    for name, module in linears(block).items():
                        width = weight_of(module).shape[1]
                        moments[f"{prefix}.{name}"] = torch.zeros(width, dtype=torch.float64, device=device)
                        hook = self._looking(index, f"{prefix}.{name}", moments[f"{prefix}.{name}"])
                        held.callback(module.register_forward_hook(hook).remove)
                    self._inputs = []
                parts = [
                    self._calls[index].run(block, part.to(device), weights).cpu()
                    for part in torch.split(self._states[-1], size)
                ]
            self._states.append(torch.cat(parts))
            self._settings.report(0.2 * (index + 1) / len(stack.blocks))
        return {path: _importance(total) for path, total in moments.items()}

    def set_aside(self, count: int) -> None:
        """Leave the first ``count`` samples to :meth:`input_sums`, and to that alone; 0: it takes all of them."""
        if count:
            self._before = [states[:count] for states in self._states]
            self._states = [states[count:] for states in self._states]
            self.ids = self.ids[count:]

    def embedded(self) -> Tensor:
        """What enters the first block, with the embedding as it is now, [n, S, H]."""
        return first_hidden(self._weights.model, self._weights.stack, self.ids, self._settings.batch_size)

    def through_blocks(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Other states that enter the first block, taken through all of them without a graph."""
        stack, size, device = self._weights.stack, self._settings.batch_size, self._settings.device
        states = list(hidden)
        for index in range(len(stack.blocks)):
            with self._weights.block(index, device) as block:
                for place, entering in enumerate(states):
                    parts = torch.split(entering, size)
                    states[place] = torch.cat(
                        [self._calls[index].run(block, part.to(device), None).cpu() for part in parts]
                    )
        return states

    def head_input_sums(self) -> Tensor:
        """H = Σ xᵀx, float32 [K, K], of what enters lm_head, on the samples that were set aside; all, if none were."""
        states, width = (self._before or self._states)[-1], self.head_weight().shape[1]
        total = torch.zeros(width, width)
        with output_of(self._weights.model, self._weights.stack, self._rest) as run, stopped_at(self._head) as entering:
            for part in torch.split(states, 1):
                with suppress(HeadReachedError):
                    run(part, self.ids[:1], {})
                rows = entered(entering).float().flatten(0, -2)
                total.addmm_(rows.t(), rows)
        return total

    def output_loss(self, hidden: Tensor | None, parameters: Mapping[str, Tensor]) -> float:
        """What the output loses, per token: KL in nats, of an encoder half the squared error.

        Args:
            hidden: last hidden states [n, S, H] in place of the model's; None: these.
            parameters: outside the blocks, in place of the model's own, by name.
        """
        others, total = self._states[-1] if hidden is None else hidden, 0.0
        with output_of(self._weights.model, self._weights.stack, self._rest) as run:
            for number in range(len(self.ids)):
                part = slice(number, number + 1)
                right = run(self._states[-1][part], self.ids[part], {})
                found = run(others[part], self.ids[part], parameters)
                total += float(_half_square(right, found) if self.encoder else _kl(right, found))
        return max(0.0, total / self.ids.numel())

    def head_weight(self) -> Tensor:
        """Weight of lm_head [V, H], which is in memory."""
        return weight_of(self._head)

    def outputs(self) -> Tensor:
        """The model's output for the last hidden states, without gradients."""
        with output_of(self._weights.model, self._weights.stack, self._rest) as run:
            singles = (slice(n, n + 1) for n in range(len(self.ids)))
            return torch.cat([run(self._states[-1][part], self.ids[part], {}) for part in singles])

    def output_gradient(self, loss: OutputLoss, seen: Seen) -> Tensor:
        """Gradient of a loss of the model's output in the last hidden states, [n, S, H].

        Args:
            loss: of the output.
            seen: gets the inputs and gradients of lm_head, sample by sample, where it is scored.
        """
        gradient = torch.empty_like(self._states[-1])
        with ExitStack() as held:
            run = held.enter_context(output_of(self._weights.model, self._weights.stack, self._rest))
            if self.head is not None:
                held.callback(self._head.register_forward_hook(_watching(self.head, seen)).remove)
            for number in range(len(self.ids)):
                part = slice(number, number + 1)
                hidden = self._states[-1][part].clone().requires_grad_()
                with torch.enable_grad():
                    loss(run(hidden, self.ids[part], {}), part).backward()  # type: ignore[no-untyped-call]
                assert hidden.grad is not None
                gradient[part] = hidden.grad
        return gradient

    def sampled_label_nll(self) -> OutputLoss:
        """Negative log-likelihood of labels drawn from the model itself; an encoder's output times normal numbers."""

        def loss(output: Tensor, _: slice) -> Tensor:
            if self.encoder:
                return torch.sum(output * torch.randn(output.shape, generator=self._generator))
            logs = torch.log_softmax(output[:, :-1].float(), -1).flatten(0, 1)
            labels = torch.multinomial(logs.detach().exp(), 1, generator=self._generator)
            return -logs.gather(1, labels).sum()

        return loss

    def data_loss(self, floats: Tensor | None) -> OutputLoss:
        """Cross-entropy of the samples themselves; an encoder's squared error against its float output."""

        def loss(output: Tensor, part: slice) -> Tensor:
            if floats is not None:
                return torch.sum((output - floats[part]).square())
            return nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), self.ids[part, 1:].flatten())

        return loss

    def backward(
        self,
        gradient: Tensor,
        seen: Seen,
        begin: Callable[[nn.Module, str], None] | None = None,
        replaced: Replaced | None = None,
    ) -> Tensor:
        """Run the blocks in reverse.

        Args:
            gradient: of the loss in the last hidden states, [n, S, H]; overwritten.
            seen: gets every linear's inputs and gradients, batch by batch.
            begin: called with each block and its path before it is replayed.
            replaced: weights in place of the blocks' own, as in :meth:`forward`.

        Returns:
            The gradient in the first block's input.
        """
        stack, size, device = self._weights.stack, self._settings.batch_size, self._settings.device
        for index in reversed(range(len(stack.blocks))):
            prefix = stack.block_name(index)
            with self._weights.block(index, device) as block, ExitStack() as held:
                weights = None if replaced is None else replaced.of(block, prefix)
                if begin is not None:
                    begin(block, prefix)
                for name, module in linears(block).items():
                    held.callback(module.register_forward_hook(_watching(f"{prefix}.{name}", seen)).remove)
                for part, out in zip(torch.split(self._states[index], size), torch.split(gradient, size), strict=True):
                    hidden = part.to(device, copy=True).requires_grad_()
                    with torch.enable_grad():
                        torch.autograd.backward(self._calls[index].run(block, hidden, weights), out.to(device))
                    assert hidden.grad is not None
                    out.copy_(hidden.grad)
            self._settings.report(1 - 0.8 * index / len(stack.blocks))
        return gradient

    def input_sums(self, block: nn.Module, prefix: str) -> dict[tuple[str, ...], Tensor]:
        """H = Σ xᵀx, float32 [K, K], of the inputs of a block's linears, by the paths of those that share one.

        The block is run once more, as :meth:`backward` has it in its hands.  Linears that no token reaches are missing.
        """
        index = next(n for n in range(len(self._states)) if self._weights.stack.block_name(n) == prefix)
        states = (self._before or self._states)[index]
        sums: dict[tuple[str, ...], Tensor] = {}
        modules = linears(block)
        with ExitStack() as held:
            for (place, _), paths in self.sharing.items():
                if place == index:
                    module = modules[paths[0].removeprefix(f"{prefix}.")]
                    held.callback(module.register_forward_hook(_summing(sums, paths)).remove)
            for part in torch.split(states, self._settings.batch_size):
                self._calls[index].run(block, part.to(self._settings.device), None)
        return sums

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
def open_backward(weights: StreamedModel, ids: Tensor, settings: BackwardSettings) -> Iterator[BlockwiseBackward]:
    """A model ready to be replayed: of its tables, what these ids need of the embedding, and lm_head, are in memory.

    Args:
        weights: the model.
        ids: token ids [n, S].
        settings: batch size, seed, device.
    """
    with weights.tables(ids):
        with weights.streamed_forward():
            calls = capture_calls(weights.model, weights.stack, ids)
        yield BlockwiseBackward(weights, ids, calls, settings)


def _watching(path: str, seen: Seen) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach()
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: seen(path, x.flatten(0, -2), gradient.flatten(0, -2))
        )

    return hook


def _summing(sums: dict[tuple[str, ...], Tensor], paths: tuple[str, ...]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
        x = args[0].detach().flatten(0, -2).float()
        if paths not in sums:
            sums[paths] = x.new_zeros(x.shape[1], x.shape[1])
        sums[paths].addmm_(x.t(), x)

    return hook


def _kl(right: Tensor, found: Tensor) -> Tensor:
    """Of the distributions over the next token, added up over positions."""
    logs = torch.log_softmax(right.float(), -1)
    return (logs.exp() * (logs - torch.log_softmax(found.float(), -1))).sum()


def _half_square(right: Tensor, found: Tensor) -> Tensor:
    return (right - found).square().sum() / 2


def _importance(total: Tensor) -> Tensor:
    """Sums of squares [K] as the grid search takes them: no channel without any weight."""
    return total.clamp(min=1e-4 * float(total.mean())).float() if bool(total.any()) else torch.ones_like(total).float()
