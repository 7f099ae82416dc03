"""End to end: rounding, scales, norms and biases of the whole model tuned together on what the model says.

Block by block, a method can only ask that hidden states stay near the float model's.  What counts is the distribution
over the next token, and which errors it forgives is known only at the end.  So the codes found block by block become
positions (_cells.py), and over a few hundred batches

    loss = mean over positions that count of KL(float model ‖ quantised model)    encoders: squared error of the output
    position u ← u - rate·sign ∂u         scale factors d, norms and biases ← Adam         both rates decay to 0

go through the whole model at once, rounding straight-through.  A few percent of the codes flip.  The float model's
last hidden states are computed once, so a step costs a forward and a backward pass of the quantised model, two heads.

    windows    a model that is too large is tuned in windows of some blocks: all but the last ask for the float model's
               hidden states behind them (squared error), the last asks for its output, as LFQ does for the last block
    memory     five copies of a window's weights; its graph is kept per block (checkpointing), logits per sample

The start and the end are compared on the same samples, and the better is kept.

In: an artifact tuned block by block, its float model.  Out: new integers on the same scheme, changed norms and biases.
Sources: EfficientQAT, arXiv 2407.11062 (scales end to end); LFQ, arXiv 2605.29756 (float logits for the last block).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from roundexport.algorithms import _sign_steps
from roundexport.algorithms._adam import Adam
from roundexport.algorithms._cells import Cells
from roundexport.blocks import BlockCall, BlockSize, Stack, linears, weight_of
from roundexport.errors import RoundexportError, UsageError
from roundexport.quantized import QuantizedLinear

NEEDS_CALIBRATION = True
_STEP_COST = 4.0  # a step with its backward pass and what is computed again for it, in forwards of its batch
_WEIGHT_COPIES = 6  # codes, positions, weights, their slopes, the state to go back to
_COMPARED_SAMPLES = 32  # on which the start and the end are compared


@dataclass(frozen=True)
class Settings:
    """How long and how far.

    Args:
        steps: per window.
        batch_size: samples per step.
        window: blocks tuned together; None: all.
        rate: first step of positions.
        scale_rate: Adam's first step of scale factors, norms and biases.
        vectors: tune norms and biases too.

    Raises:
        UsageError: a value is out of range.
    """

    steps: int = 200
    batch_size: int = 8
    window: int | None = None
    rate: float = 5e-3
    scale_rate: float = 6e-3
    vectors: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        if not (0 < self.rate < 1 and 0 < self.scale_rate < 1):
            raise UsageError(f"rates must be between 0 and 1, not {self.rate} and {self.scale_rate}")

    def cost(self, samples: int) -> float:
        """Block forwards over one sample that a block takes."""
        return _STEP_COST * self.steps * min(self.batch_size, samples) + 2 * samples

    def roundings(self) -> float:
        """Work on weights alone, in roundings of them to nearest."""
        return float(self.steps)

    def memory(self, size: BlockSize) -> float:
        """Float32 values held at most beside a block: the float model, and what a window is tuned with."""
        window = min(self.window or size.blocks, size.blocks)
        graph = size.outputs * size.length * self.batch_size * 4
        return size.blocks * size.weights + _WEIGHT_COPIES * window * size.weights + graph


@dataclass(frozen=True, eq=False)
class FinishInputs:
    """What a finish is given.

    Args:
        model: the float model, in memory; its token embedding and head are exchanged while it works, and put back.
        stack: its blocks.
        calls: how each block is called.
        ids: calibration samples [n, S].
        mask: [n, S], 1 where a position counts.
        start: hidden states that enter the first block behind quantised tables, [n, S, H].
        floats: those of the float model.
        tables: quantised values of tables and of whatever lies outside the blocks, by parameter name.
        layers: quantised linears by path.
        vectors: norms and biases inside blocks as they are now, by parameter name; they are tuned.
        fixed: other parameters inside blocks that are no longer the float model's, by parameter name.
        seed: of the order of samples.
        device: where to compute.
        report: called with the share of the work that is done.
    """

    model: nn.Module
    stack: Stack
    calls: Sequence[BlockCall]
    ids: Tensor
    mask: Tensor
    start: Tensor
    floats: Tensor
    tables: Mapping[str, Tensor]
    layers: Mapping[str, QuantizedLinear]
    vectors: Mapping[str, Tensor]
    fixed: Mapping[str, Tensor]
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    report: Callable[[float], None] = lambda done: None


@dataclass(frozen=True, eq=False)
class FinishResult:
    """What a finish hands back.

    Args:
        layers: quantised linears by path.
        vectors: norms and biases, by parameter name.
        losses: of each window, before and after.
    """

    layers: dict[str, QuantizedLinear]
    vectors: dict[str, Tensor]
    losses: tuple[tuple[float, float], ...]


def finish(inputs: FinishInputs, settings: Settings) -> FinishResult:
    """Tune a quantised model window by window, or as a whole.

    Args:
        inputs: the float model and what its blocks were quantised to.
        settings: how long and how far.

    Raises:
        RoundexportError: the loss is not a finite number.
    """
    count = len(inputs.stack.blocks)
    size = settings.window or count
    quantised, floats = inputs.start, inputs.floats
    layers: dict[str, QuantizedLinear] = {}
    vectors: dict[str, Tensor] = {}
    losses = []
    for begin in range(0, count, size):
        window = _Window(inputs, settings, range(begin, min(begin + size, count)))
        floats = window.float_output(floats)
        losses.append(window.tune(quantised, floats))
        quantised = window.output(quantised) if begin + size < count else quantised
        layers.update(window.layers())
        vectors.update(window.vectors())
    return FinishResult(layers, vectors, tuple(losses))


class _Window:
    """Some consecutive blocks, with the positions of their codes."""

    def __init__(self, inputs: FinishInputs, settings: Settings, blocks: range) -> None:
        self._inputs, self._settings, self._blocks = inputs, settings, blocks
        self._last = blocks.stop == len(inputs.stack.blocks)
        self._rest = _beside(inputs)
        self._cells: dict[str, Cells] = {}
        self._floats: dict[str, Tensor] = {}
        for index in blocks:
            block, prefix = inputs.stack.blocks[index], f"{inputs.stack.block_name(index)}."
            for name, module in linears(block).items():
                if prefix + name in inputs.layers:
                    weight = weight_of(module).to(inputs.device)
                    self._cells[prefix + name] = Cells.of(weight, inputs.layers[prefix + name])
            for name, tensor in inputs.vectors.items():
                if name.startswith(prefix):
                    self._floats[name] = tensor.to(inputs.device).clone()
        self._fixed = {name: tensor.to(inputs.device) for name, tensor in inputs.fixed.items()}
        factors = [cells.factor for cells in self._cells.values()]
        trained = list(self._floats.values()) if settings.vectors else []
        self._adam = Adam([*factors, *trained])

    def tune(self, start: Tensor, target: Tensor) -> tuple[float, float]:
        """Run the steps; returns the loss before and after, over the same samples."""
        settings, inputs = self._settings, self._inputs
        before, kept = self._compare(start, target), self._state()
        cycle = _sign_steps.batches(len(start), settings.batch_size, inputs.seed + self._blocks.start)
        for step in range(settings.steps):
            decay = 1 - step / settings.steps
            self._step(start, target, next(cycle), decay)
            inputs.report((self._blocks.start + len(self._blocks) * (step + 1) / settings.steps) / len(inputs.calls))
        after = self._compare(start, target)
        if not (before < float("inf") and after < float("inf")):
            raise RoundexportError(f"the loss of the finish is not a finite number: {before}, {after}")
        if after > before:
            self._restore(kept)
        return before, min(before, after)

    def float_output(self, hidden: Tensor) -> Tensor:
        """What the float blocks make of hidden states [n, S, H]."""
        return self._passed(hidden, lambda index, part: self._call(index, part, None, None))

    def output(self, hidden: Tensor) -> Tensor:
        """What the quantised blocks make of them."""
        weights = {name: cells.weight() for name, cells in self._cells.items()}
        return self._passed(hidden, lambda index, part: self._call(index, part, weights, self._floats))

    def layers(self) -> dict[str, QuantizedLinear]:
        """The integers."""
        found = {}
        for name, cells in self._cells.items():
            cells.weight()
            found[name] = cells.quantized()
        return found

    def vectors(self) -> dict[str, Tensor]:
        """Norms and biases, in main memory; none where they were left alone."""
        return {name: tensor.detach().cpu() for name, tensor in self._floats.items()} if self._settings.vectors else {}

    def _step(self, start: Tensor, target: Tensor, batch: Tensor, decay: float) -> None:
        settings = self._settings
        weights = {name: cells.weight().requires_grad_() for name, cells in self._cells.items()}
        floats = {name: tensor.detach().requires_grad_(settings.vectors) for name, tensor in self._floats.items()}
        trained = list(floats.values()) if settings.vectors else []
        loss = self._loss(start, target, batch, weights, floats)
        slopes = torch.autograd.grad(loss, [*weights.values(), *trained])
        own, rest = slopes[: len(weights)], slopes[len(weights) :]
        factors = []
        for cells, slope in zip(self._cells.values(), own, strict=True):
            position, factor = cells.slopes(slope)
            cells.position.sub_(position.sign_(), alpha=settings.rate * decay)
            factors.append(factor)
        self._adam.step([*factors, *rest], settings.scale_rate * decay)

    def _loss(
        self,
        start: Tensor,
        target: Tensor,
        batch: Tensor,
        weights: Mapping[str, Tensor],
        floats: Mapping[str, Tensor],
    ) -> Tensor:
        inputs = self._inputs
        hidden, wanted = start[batch].to(inputs.device), target[batch].to(inputs.device)
        mask = inputs.mask[batch].to(inputs.device)
        for index in self._blocks:
            hidden = self._call(index, hidden, weights, floats)
        if not self._last:
            error = (hidden - wanted) * mask[..., None]
            return error.square().sum() / (mask.sum().clamp(min=1) * hidden.shape[-1])
        samples = [
            checkpoint(self._output_loss, hidden[n], wanted[n], mask[n], inputs.ids[index], use_reentrant=False)
            for n, index in enumerate(batch)
        ]
        return torch.stack(samples).sum() / mask.sum().clamp(min=1)

    def _output_loss(self, hidden: Tensor, wanted: Tensor, mask: Tensor, ids: Tensor) -> Tensor:
        """Of one sample, summed over positions: KL(float ‖ quantised), or an encoder's mean squared error."""
        # Opened in here and not around the loop: blocks are run again in the backward pass, with their own forward.
        with head(self._inputs.model, self._inputs.stack, ids[None], self._rest) as output:
            found = output(hidden[None], self._inputs.tables)[0]
            with torch.no_grad():
                expected = output(wanted[None], {})[0]
        if found.shape == hidden.shape:
            return ((found - expected).square().mean(-1) * mask).sum()
        logs, reference = torch.log_softmax(found, -1), torch.log_softmax(expected, -1)
        return ((reference.exp() * (reference - logs)).sum(-1) * mask).sum()

    def _compare(self, start: Tensor, target: Tensor) -> float:
        """Loss over samples spread over the calibration set."""
        count = min(_COMPARED_SAMPLES, len(start))
        chosen = torch.linspace(0, len(start) - 1, count).round().long()
        weights = {name: cells.weight() for name, cells in self._cells.items()}
        with torch.no_grad():
            parts = [
                (len(part), self._loss(start, target, part, weights, self._floats).item())
                for part in torch.split(chosen, self._settings.batch_size)
            ]
        return sum(size * value for size, value in parts) / count

    def _call(
        self, index: int, hidden: Tensor, weights: Mapping[str, Tensor] | None, floats: Mapping[str, Tensor] | None
    ) -> Tensor:
        inputs = self._inputs
        block, prefix = inputs.stack.blocks[index].to(inputs.device), f"{inputs.stack.block_name(index)}."
        own = _inside(weights, prefix)
        others = None if floats is None else _inside({**self._fixed, **floats}, prefix)
        if not torch.is_grad_enabled():
            return inputs.calls[index].run(block, hidden, own, others)
        found: Tensor = checkpoint(inputs.calls[index].run, block, hidden, own, others, use_reentrant=False)
        return found

    def _passed(self, hidden: Tensor, run: Callable[[int, Tensor], Tensor]) -> Tensor:
        out = torch.empty_like(hidden)
        with torch.no_grad():
            for begin in range(0, len(hidden), self._settings.batch_size):
                part = hidden[begin : begin + self._settings.batch_size].to(self._inputs.device)
                for index in self._blocks:
                    part = run(index, part)
                out[begin : begin + self._settings.batch_size] = part
        return out

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        points = {name: cells.state() for name, cells in self._cells.items()}
        return points, {name: tensor.clone() for name, tensor in self._floats.items()}

    def _restore(self, state: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
        for name, point in state[0].items():
            self._cells[name].restore(point)
        self._floats.update(state[1])


@contextmanager
def head(model: nn.Module, stack: Stack, ids: Tensor, rest: tuple[Any, ...] | None) -> Iterator[Callable[..., Tensor]]:
    """What takes last hidden states to the model's output: the model with blocks that hand these on.

    Args:
        model: the float model.
        stack: its blocks.
        ids: samples [n, S].
        rest: what a block returns beside hidden states; None where it returns nothing else.

    Yields:
        A function of hidden states [n, S, H] and parameters to use by name, which gives logits, or an encoder's last
        hidden states.
    """
    current = [torch.empty(0)]
    encoder = model.get_output_embeddings() is None  # type: ignore[operator]

    def instead(*_: Any, **__: Any) -> Any:
        return current[0] if rest is None else (current[0], *rest)

    def run(hidden: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        current[0] = hidden
        kwargs: dict[str, Any] = {"input_ids": ids.to(hidden.device)}
        if not encoder:
            kwargs["use_cache"] = False
        output = torch.func.functional_call(model, dict(parameters), (), kwargs)
        found: Tensor = output.last_hidden_state if encoder else output.logits
        return found.float()

    for block in stack.blocks:
        block.forward = instead
    try:
        yield run
    finally:
        for block in stack.blocks:
            del block.forward


def _beside(inputs: FinishInputs) -> tuple[Any, ...] | None:
    """What a block returns beside hidden states."""
    found: list[Any] = []
    block = inputs.stack.blocks[0]
    handle = block.register_forward_hook(lambda _, __, output: found.append(output))
    try:
        with torch.no_grad():
            inputs.calls[0].run(block, inputs.start[:1].to(inputs.device))
    finally:
        handle.remove()
    return found[0][1:] if isinstance(found[0], tuple) else None


def _inside(values: Mapping[str, Tensor] | None, prefix: str) -> dict[str, Tensor] | None:
    """What belongs to a block, by name in it."""
    if values is None:
        return None
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
