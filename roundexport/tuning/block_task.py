"""The work on one block: a task that can be pickled, and the function that runs it in any process.

    BlockTask ──▶ run_task ──▶ TunedBlock          the task names files, methods and a device; it holds no live object

    float outputs     the float block on the float hidden states; left out where the method computes them itself
    transform         the block becomes an equivalent one that rounds better, where a transform is set
    norms, biases     in eight bits, where everything is quantized
    rounding          the method's integers for the block's linears
    outputs           the block with these integers on the quantized hidden states

Hidden states are read from and written to mapped files (hidden_states.py), so a task carries their paths, and its
outputs are on the disk when it returns.  Everything else comes back in :class:`TunedBlock`.  A process that has the
model open already passes it as :class:`BlockContext`; elsewhere :meth:`BlockContext.open` opens what the task names.
Both give the same bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from roundexport.algorithms.interface import BlockInputs, BlockResult
from roundexport.model.block_call import BlockCall, run_all
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.streamed_model import StreamedModel
from roundexport.quant.int8_tensor import Int8Tensor

from .chosen_methods import split_report
from .hidden_states import Hidden, drop
from .output_fisher import behind_factors
from .tensor_files import read_tensors

if TYPE_CHECKING:
    from roundexport.algorithms.parts import Parts
    from roundexport.quant.quantized_linear import QuantizedLinear
    from roundexport.quant.spec import QuantSpec

    from .chosen_methods import ChosenRounding, ChosenTransform

PartsOf = Callable[["BlockTask", nn.Module, int], "AbstractContextManager[Parts]"]
"""Given a task, its block and the samples of a batch: who does the parts of the work."""


@dataclass(frozen=True, eq=False)
class TaskStates:
    """Hidden states of a task.

    Args:
        call: how the block is called.
        mask: [samples, length], positions that count.
        before: file of the hidden states that enter the block.
        after: file, reserved already, for those that leave it.
        needed: the quantized outputs are needed, as another block follows and its method looks at them.
    """

    call: BlockCall
    mask: Tensor
    before: Path
    after: Path
    needed: bool


@dataclass(frozen=True, eq=False)
class BlockTask:
    """Everything that decides what becomes of one block; can be pickled.

    Args:
        model: folder of the float model.
        bfloat16: products in blocks are computed in bfloat16.
        index: the block's.
        specs: scheme by the linear's name in the block; empty keeps the block float.
        vectors: norms and biases of the block to round to eight bits, by name in the block.
        rounding: the rounding method and its settings.
        transform: the transform before it, or None.
        states: hidden states; None where no method looks at them.
        batch_size: samples that go through the block at a time.
        seed: of everything random in this block.
        device: where to compute.
        max_bytes: memory limit of the process; None means no limit.
        part: of a folder that holds several models.
        fisher: file of what an error of each output costs the model; None: the method does not look at it.
    """

    model: Path
    bfloat16: bool
    index: int
    specs: Mapping[str, QuantSpec]
    vectors: tuple[str, ...]
    rounding: ChosenRounding
    transform: ChosenTransform | None
    states: TaskStates | None
    batch_size: int
    seed: int
    device: torch.device
    max_bytes: int | None
    part: str | None = None
    fisher: Path | None = None


@dataclass(frozen=True, eq=False)
class TunedBlock:
    """What became of a block; names are those in the block.

    Args:
        layers: integers of its linears.
        overrides: other parameters that a transform changed, float32.
        vectors: norms and biases in eight bits.
        loss_before: see :class:`BlockResult`.
        loss_after: likewise.
        layer_losses: likewise.
        note: likewise.
    """

    layers: Mapping[str, QuantizedLinear]
    overrides: Mapping[str, Tensor]
    vectors: Mapping[str, Int8Tensor]
    loss_before: float | None
    loss_after: float | None
    layer_losses: Mapping[str, tuple[float, float]]
    note: str = ""


@dataclass(frozen=True, eq=False)
class BlockContext:
    """What a process holds open for a task.

    Args:
        model: the float model.
        before: hidden states that enter the block; None without calibration.
        after: hidden states that leave it; None without calibration.
        report: called with the share of the block that is done.
        parts: who does the parts of the work, where the method has parts; None: this process.
    """

    model: StreamedModel
    before: Hidden | None
    after: Hidden | None
    report: Callable[[float], None] = lambda done: None
    parts: PartsOf | None = None

    @classmethod
    def open(cls, task: BlockTask) -> BlockContext:
        """Open what a task names, in a process that holds nothing of it yet."""
        model = StreamedModel(Checkpoint.open(task.model, part=task.part), bfloat16=task.bfloat16)
        if task.states is None:
            return cls(model, None, None)
        return cls(model, Hidden.open(task.states.before), Hidden.open(task.states.after))


def run_task(task: BlockTask, context: BlockContext | None = None) -> TunedBlock:
    """Tune one block.

    Args:
        task: what to do.
        context: what is open already; None opens what the task names.

    Returns:
        Integers and changed parameters; the hidden states that leave the block are in the task's file.

    Raises:
        SpecError: a scheme does not fit its weight.
        RoundexportError: a loss is not a finite number.
    """
    context = context or BlockContext.open(task)
    with context.model.block(task.index, task.device) as block:
        return _BlockRun(task, context, block).run()


class _BlockRun:
    """A task while it runs."""

    def __init__(self, task: BlockTask, context: BlockContext, block: nn.Module) -> None:
        self._task, self._context, self._block = task, context, block

    def run(self) -> TunedBlock:
        task, block = self._task, self._block
        inputs, overrides, result = self._inputs(), dict[str, Tensor](), BlockResult({})
        if task.specs and task.transform is not None:
            samples = len(inputs.mask)
            costs = task.transform.forward_passes(samples), task.rounding.settings.forward_passes(samples)
            before, after = split_report(inputs.report, *costs)
            done = task.transform.apply(block, task.index, dataclasses.replace(inputs, report=before), task.specs)
            overrides = dict(done.changed)
            fisher = behind_factors(inputs.fisher, done.row_factors)
            inputs = dataclasses.replace(inputs, report=after, fisher=fisher)
        vectors = {name: round_in_place(block.get_parameter(name)) for name in task.vectors}
        if task.specs:
            result = task.rounding.method.tune_block(block, inputs, task.specs, task.rounding.settings)
        if task.states is not None and task.states.needed and not result.outputs_written:
            self._outputs(result.layers)
        losses = result.loss_before, result.loss_after, result.layer_losses
        return TunedBlock(result.layers, overrides, vectors, *losses, result.note)

    def _inputs(self) -> BlockInputs:
        """What the transform and the rounding method are given; the target is filled, unless the method fills it."""
        task, states, before, after = self._task, self._task.states, self._context.before, self._context.after
        if states is None or before is None or after is None:
            return BlockInputs.none(task.seed, task.device)
        # A transform may need the target; and 8-bit norms, which a block gets next, are not the float model's.
        fills = bool(task.specs) and task.rounding.method.computes_float_outputs and not task.vectors
        fills = fills and (task.transform is None or not task.transform.reads_target)
        if not fills:
            self._take_through(before.floats, after.floats)

        parts = self._context.parts
        fisher = {} if task.fisher is None else read_tensors(task.fisher)
        return dataclasses.replace(
            states_of(task, self._context),
            float_outputs_ready=not fills,
            fisher=fisher,
            parts=None if parts is None else functools.partial(parts, task, self._block),
        )

    def _outputs(self, layers: Mapping[str, QuantizedLinear]) -> None:
        """The quantized hidden states that leave the block."""
        before, after = self._context.before, self._context.after
        assert before is not None and after is not None
        weights = {n: torch.from_numpy(linear.dequantize()).to(self._task.device) for n, linear in layers.items()}
        self._take_through(before.quantized, after.quantized, weights)

    def _take_through(self, hidden: Tensor, out: Tensor, weights: Mapping[str, Tensor] | None = None) -> None:
        task, states, before, after = self._task, self._task.states, self._context.before, self._context.after
        assert states is not None and before is not None and after is not None
        run_all(
            self._block, states.call, hidden, task.batch_size, task.device, weights, out, lambda: drop(before, after)
        )


def states_of(task: BlockTask, context: BlockContext) -> BlockInputs:
    """What a method is given of a task's hidden states.

    Args:
        task: one with hidden states.
        context: what is open of them.
    """
    states, before, after = task.states, context.before, context.after
    assert states is not None and before is not None and after is not None

    def report(share: float) -> None:
        context.report(share)
        drop(before, after)

    return BlockInputs(
        call=states.call,
        quantized_inputs=before.quantized,
        float_inputs=before.floats,
        target=after.floats,
        mask=states.mask,
        seed=task.seed,
        device=task.device,
        report=report,
        quantized_output_buffer=after.quantized if states.needed else None,
        max_bytes=task.max_bytes,
    )


def round_in_place(parameter: Tensor) -> Int8Tensor:
    """A norm or bias in eight bits, which the parameter holds from then on."""
    values = parameter.detach()
    rounded = Int8Tensor.nearest(values.float().cpu().numpy())
    values.copy_(torch.from_numpy(rounded.values()))
    return rounded
