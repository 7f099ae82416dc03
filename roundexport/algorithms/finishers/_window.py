"""A window of consecutive blocks trained together against the float model; end_to_end.py explains the method.

A step has three parts: a forward pass of the window under autograd, the loss and its gradient with respect to the
window's last hidden states, and the backward pass of the window from that gradient.  The gradient of the loss is
computed by formula, one sample at a time, so the logits of only one sample are in memory:

    KL(p ‖ q) of logits a, mean over m positions     ∂a = (softmax(a) - p)/m; autograd takes it through the head
    squared error of hidden states h                 ∂h = 2·(h - target)/(m·H)

The window's autograd graph is kept where it is small (_GRAPH_BYTES); larger ones use gradient checkpointing by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from roundexport.algorithms.common.adam import Adam
from roundexport.algorithms.common.batches import shuffled_batches
from roundexport.algorithms.common.latent_codes import LatentCodes
from roundexport.algorithms.interface import BlockSize
from roundexport.calibration.evenly_spread import evenly_spread
from roundexport.errors import RoundexportError
from roundexport.model.blocks import linears, weight_of
from roundexport.model.head_products import near_products
from roundexport.model.output_head import OutputOf, output_of, returned_beside

if TYPE_CHECKING:
    from roundexport.algorithms.finishing import FinishInputs
    from roundexport.quant.quantized_linear import QuantizedLinear


_POSITIONS_DECAY = 0.99  # β₂ of latent codes; their gradients vary between batches far more than those of scales
_RATES, _LEAST_RATE = {2: 1 / 100, 3: 1 / 140}, 1 / 200  # by bits: a coarser grid needs larger steps
_COMPARED_SAMPLES = 32  # on which the start and the end are compared
_KEPT_PER_OUTPUT = 4  # float32 values that autograd keeps per output of a linear and token
_GRAPH_BYTES = 2 << 30  # a window whose graph is larger is checkpointed


def graph_values(size: BlockSize, batch_size: int, blocks: int) -> float:
    """Float32 values in the autograd graph of a window: of all its blocks, or of one where it is checkpointed."""
    block = float(_KEPT_PER_OUTPUT * size.outputs * size.length * batch_size)
    return block * blocks if 4 * block * blocks <= _GRAPH_BYTES else block


@dataclass(frozen=True)
class WindowSettings:
    """How long and how far a window is tuned; the fields are those of EndToEndSettings."""

    steps: int
    batch_size: int
    rate: float | None
    scale_rate: float
    vectors: bool


class Window:
    """Consecutive blocks with the latent codes of their linears.

    Args:
        inputs: the float model and what its blocks were quantized to.
        settings: how long and how far.
        blocks: which ones; they are in memory, on the device.
    """

    def __init__(self, inputs: FinishInputs, settings: WindowSettings, blocks: range) -> None:
        self._inputs, self._settings, self._blocks = inputs, settings, blocks
        self._stack = stack = inputs.weights.stack
        self._last = blocks.stop == len(stack.blocks)
        first = stack.blocks[blocks.start]
        self._rest = returned_beside(first, inputs.calls[blocks.start], inputs.start[:1].to(inputs.device))
        size = BlockSize.of(first, len(inputs.start), inputs.start.shape[1])
        one, all_of_them = (graph_values(size, settings.batch_size, count) for count in (1, len(blocks)))
        self._checkpointed = len(blocks) > 1 and one == all_of_them
        self._cells: dict[str, LatentCodes] = {}
        self._floats: dict[str, Tensor] = {}
        for index in blocks:
            block, prefix = stack.blocks[index], f"{stack.block_name(index)}."
            for name, module in linears(block).items():
                if prefix + name in inputs.layers:
                    linear = inputs.layers[prefix + name]
                    weight = torch.from_numpy(linear.dequantize()) if inputs.transformed else weight_of(module)
                    self._cells[prefix + name] = LatentCodes.of(weight.to(inputs.device), linear)
            for name, tensor in inputs.vectors.items():
                if name.startswith(prefix):
                    self._floats[name] = tensor.to(inputs.device).clone()
        self._fixed = {name: tensor.to(inputs.device) for name, tensor in inputs.fixed.items()}
        cells = self._cells.values()
        trained = list(self._floats.values()) if settings.vectors else []
        self._positions = Adam([cell.position for cell in cells], _POSITIONS_DECAY)
        self._scales = Adam([*(cell.factor for cell in cells), *trained])

    def tune(self, start: Tensor, target: Tensor) -> tuple[float, float]:
        """Run the steps; returns the loss before and after, over the same samples.

        Args:
            start: hidden states that enter the window, [n, S, H].
            target: the float model's hidden states after it, [n, S, H].

        Raises:
            RoundexportError: the loss is not a finite number.
        """
        settings, inputs = self._settings, self._inputs
        before = self._compare(start, target)
        first = {name: tensor.clone() for name, tensor in self._learned().items()}
        cycle = shuffled_batches(len(start), settings.batch_size, inputs.seed + self._blocks.start)
        point = inputs.state.load(self._blocks.start)
        if point is not None:
            self._restore(point.tensors)
            self._positions.count = self._scales.count = point.step
        for step in range(settings.steps):
            batch = next(cycle)
            if point is not None and step < point.step:
                continue
            self._step(start, target, batch, 1 - step / settings.steps)
            if inputs.state.due() or step + 1 == settings.steps:
                inputs.state.save(self._blocks.start, step + 1, self._tensors())
            inputs.report((self._blocks.start + len(self._blocks) * (step + 1) / settings.steps) / len(inputs.calls))
        after = self._compare(start, target)
        if not (before < float("inf") and after < float("inf")):
            raise RoundexportError(f"the loss of the finish is not a finite number: {before}, {after}")
        if after > before:
            self._restore(first)
        return before, min(before, after)

    def float_output(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, S, H] through the float blocks."""
        return self._passed(hidden, lambda index, part: self._call(index, part, None, None))

    def output(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, S, H] through the quantized blocks."""
        weights = {name: cells.weight() for name, cells in self._cells.items()}
        return self._passed(hidden, lambda index, part: self._call(index, part, weights, self._floats))

    def layers(self) -> dict[str, QuantizedLinear]:
        """The quantized linears by path."""
        found = {}
        for name, cells in self._cells.items():
            cells.weight()
            found[name] = cells.quantized()
        return found

    def vectors(self) -> dict[str, Tensor]:
        """Norms and biases, in main memory; empty where they are not trained."""
        return {name: tensor.detach().cpu() for name, tensor in self._floats.items()} if self._settings.vectors else {}

    def _step(self, start: Tensor, target: Tensor, batch: Tensor, decay: float) -> None:
        settings = self._settings
        weights = {name: cells.weight().requires_grad_() for name, cells in self._cells.items()}
        floats = {name: tensor.detach().requires_grad_(settings.vectors) for name, tensor in self._floats.items()}
        trained = list(floats.values()) if settings.vectors else []
        hidden = self._hidden(start[batch], weights, floats)
        gradient = self._gradient(hidden.detach(), target, batch)
        gradients = torch.autograd.grad(hidden, [*weights.values(), *trained], gradient)
        own = [cells.gradients(gradient) for cells, gradient in zip(self._cells.values(), gradients, strict=False)]
        rates = [_rate(cells.spec.bits, settings.rate) for cells in self._cells.values()]
        self._positions.step([position for position, _ in own], [rate * decay for rate in rates])
        others = [*(factor for _, factor in own), *gradients[len(own) :]]
        self._scales.step(others, [settings.scale_rate * decay] * len(others))

    def _hidden(self, hidden: Tensor, weights: Mapping[str, Tensor], floats: Mapping[str, Tensor]) -> Tensor:
        """Hidden states after the window."""
        hidden = hidden.to(self._inputs.device)
        for index in self._blocks:
            hidden = self._call(index, hidden, weights, floats)
        return hidden

    @torch.no_grad()
    def _loss(self, hidden: Tensor, target: Tensor, batch: Tensor) -> float:
        """Loss of a batch from the hidden states after the window."""
        wanted, mask = target[batch], self._inputs.mask[batch]
        if not self._last:
            error, counted = _weighted_error(hidden, wanted, mask)
            return float(error.square().sum()) / counted
        return sum(
            _output_loss(run, hidden[part].cpu(), expected, weight)
            for part, run, expected, weight in self._outputs(wanted, mask, batch)
        )

    @torch.no_grad()
    def _gradient(self, hidden: Tensor, target: Tensor, batch: Tensor) -> Tensor:
        """The loss's gradient in these hidden states."""
        wanted, mask = target[batch], self._inputs.mask[batch]
        if not self._last:
            error, counted = _weighted_error(hidden, wanted, mask)
            return error.mul_(2 / counted)
        found = torch.empty_like(hidden)
        for part, run, expected, weight in self._outputs(wanted, mask, batch):
            found[part] = _output_gradient(run, hidden[part].cpu(), expected, weight).to(found.device)
        return found

    def _outputs(
        self, wanted: Tensor, mask: Tensor, batch: Tensor
    ) -> Iterator[tuple[slice, Callable[[Tensor], Tensor], Tensor, Tensor]]:
        """For each sample: where it is, what takes its hidden states to an output, the float model's, and weights.

        Final norm and head stay in main memory.
        """
        inputs, counted = self._inputs, float(mask.sum().clamp(min=1))
        model = inputs.weights.model
        products = near_products(model) if inputs.weights.bfloat16 else nullcontext()
        with output_of(model, self._stack, self._rest) as output, products:
            for n, sample in enumerate(batch):
                part, ids = slice(n, n + 1), inputs.ids[sample][None]
                expected = output(wanted[part], ids, {})
                yield part, _bound(output, ids, inputs.tables), expected, mask[part] / counted

    def _compare(self, start: Tensor, target: Tensor) -> float:
        """Loss over samples at equal distances in the calibration set."""
        chosen = evenly_spread(len(start), _COMPARED_SAMPLES)
        weights = {name: cells.weight() for name, cells in self._cells.items()}
        total = 0.0
        with torch.no_grad():
            for part in torch.split(chosen, self._settings.batch_size):
                total += len(part) * self._loss(self._hidden(start[part], weights, self._floats), target, part)
        return total / len(chosen)

    def _call(
        self, index: int, hidden: Tensor, weights: Mapping[str, Tensor] | None, floats: Mapping[str, Tensor] | None
    ) -> Tensor:
        call, block, prefix = self._inputs.calls[index], self._stack.blocks[index], f"{self._stack.block_name(index)}."
        own = _inside(weights, prefix)
        others = None if floats is None else _inside({**self._fixed, **floats}, prefix)
        if not (self._checkpointed and torch.is_grad_enabled()):
            return call.run(block, hidden, own, others)
        found: Tensor = checkpoint(call.run, block, hidden, own, others, use_reentrant=False)
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

    def _learned(self) -> dict[str, Tensor]:
        """The trained tensors by name (not copies)."""
        found = {f"floats.{name}": tensor for name, tensor in self._floats.items()}
        for name, cells in self._cells.items():
            found |= {f"position.{name}": cells.position, f"factor.{name}": cells.factor}
        return found

    def _tensors(self) -> dict[str, Tensor]:
        """The whole state by name: the trained tensors and their moments."""
        found = self._learned()
        for kind, adam in (("positions", self._positions), ("scales", self._scales)):
            found |= {f"{kind}.{name}": tensor for name, tensor in adam.moments().items()}
        return found

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        own = self._tensors()
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _rate(bits: int, asked: float | None) -> float:
    return _RATES.get(bits, _LEAST_RATE) if asked is None else asked


def _weighted_error(hidden: Tensor, wanted: Tensor, mask: Tensor) -> tuple[Tensor, float]:
    """Error of hidden states at positions that count, and how many values that are."""
    mask = mask.to(hidden.device)
    error = (hidden - wanted.to(hidden.device)) * mask[..., None]
    return error, float(mask.sum().clamp(min=1)) * hidden.shape[-1]


def _output_loss(output: Callable[[Tensor], Tensor], hidden: Tensor, expected: Tensor, weight: Tensor) -> float:
    """KL(float ‖ quantized) of one sample, or an encoder's mean squared error; positions weighted by ``weight``.

    Logits of a whole text have no positions: their squared error counts as much as all of them do.
    """
    found = output(hidden)
    weight = weight.sum(-1) if found.ndim < hidden.ndim else weight
    if _is_vector(found, hidden):
        return float(((found - expected).square().mean(-1) * weight).sum())
    logs, reference = torch.log_softmax(found, -1), torch.log_softmax(expected, -1)
    return float(((reference.exp() * reference.sub_(logs)).sum(-1) * weight).sum())


def _output_gradient(output: Callable[[Tensor], Tensor], hidden: Tensor, expected: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the same in ``hidden``."""
    inner = hidden.clone().requires_grad_()
    with torch.enable_grad():
        found = output(inner)
    weight = weight.sum(-1) if found.ndim < hidden.ndim else weight
    if _is_vector(found, hidden):
        own = (found.detach() - expected).mul_(2 / expected.shape[-1])
    else:
        own = torch.softmax(found.detach(), -1).sub_(torch.softmax(expected, -1))
    return torch.autograd.grad(found, inner, own.mul_(weight[..., None]))[0]


def _is_vector(found: Tensor, hidden: Tensor) -> bool:
    """Whether an output is hidden states, or logits of a whole text: it has a squared error and no distribution."""
    return found.shape == hidden.shape or found.ndim < hidden.ndim


def _bound(output: OutputOf, ids: Tensor, tables: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda hidden: output(hidden, ids, tables)


def _inside(values: Mapping[str, Tensor] | None, prefix: str) -> dict[str, Tensor] | None:
    """What belongs to a block, by name in it."""
    if values is None:
        return None
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
