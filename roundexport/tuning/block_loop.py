"""The loop over the blocks of a tuning run: one task per block, its integers written, its state recorded.

    tables and vectors outside the blocks are rounded        table_rounding.py
    hidden states are taken to the first block               block_states.py
    for every block    task → run_task → TunedBlock          block_task.py
                       overrides, integers → the artifact, synced
                       state recorded; a run that was killed goes on from here       checkpointing.py

A block needs the quantized outputs of the one before it, so the tasks of one run follow each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from roundexport.calibration.loss_mask import loss_mask
from roundexport.kernels import round_to_nearest
from roundexport.model.block_call import capture_calls, first_hidden
from roundexport.types import PAIRS

from .block_states import BlockStates
from .block_task import BlockContext, BlockTask, PartsOf, TaskStates, TunedBlock, run_task
from .disk_need import check_run
from .half_states import HalfStates
from .head_rounding import head_rounding
from .limits import announce
from .table_rounding import NO_ROWS, TableRounder

if TYPE_CHECKING:
    from roundexport.calibration.samples import Calibration
    from roundexport.formats.artifact_writer import ArtifactWriter

    from .checkpointing import TuneState
    from .hidden_states import Hidden
    from .job import Job
    from .progress import Progress


class BlockLoop:
    """Tunes the blocks that are left.

    Args:
        job: the run, with the final schemes and a trained transform.
        state: what is done already; grows block by block.
        writer: of the artifact in the state's folder.
        progress: where to report.
        parts: who does the parts of a block's work; None: this process.
    """

    def __init__(
        self, job: Job, state: TuneState, writer: ArtifactWriter, progress: Progress, parts: PartsOf | None = None
    ) -> None:
        self._job, self._state, self._writer, self._progress, self._parts = job, state, writer, progress, parts
        self._halves: HalfStates | None = None
        quantize = job.rounding.method.quantize_table or round_to_nearest.run
        self._tables = TableRounder(job.weights, job.plan, writer, quantize)

    def run(self, calibration: Calibration | None) -> None:
        """Tune all blocks that an earlier run left.

        Args:
            calibration: samples; None where no block looks at hidden states.
        """
        done, count = self._state.blocks_done, len(self._job.plan.stack.blocks)
        shape = None if calibration is None else (len(calibration.ids), calibration.ids.shape[1])
        shared = self._parts is not None
        self._progress.say(check_run(self._job, self._state, shape, shared))
        if calibration is None:  # tables and blocks are one piece of work, announced before it begins
            announce(self._job, done, None, self._progress)
        states = self._begin(calibration) if done < count else None
        for index in range(-1, done):  # the writer forgets overrides when a run ends before its artifact
            changed = self._state.overrides(index)
            self._add_overrides(changed)
            self._tables.again(index, changed)
        if calibration is not None:
            announce(self._job, done, states, self._progress)
        for index in range(done, count):
            states = self._tune(index, states)

    def task(self, index: int, states: TaskStates | None) -> BlockTask:
        """The task of a block.

        Args:
            index: the block's.
            states: its hidden states; None where no block looks at them.
        """
        job = self._job
        prefix = f"{job.plan.stack.block_name(index)}."
        return BlockTask(
            model=job.checkpoint.folder.absolute(),  # a worker has another working folder
            part=job.checkpoint.part,
            bfloat16=job.weights.bfloat16,
            index=index,
            specs=job.plan.block_specs[index],
            vectors=tuple(name.removeprefix(prefix) for name in job.plan.vectors if name.startswith(prefix)),
            rounding=job.rounding,
            transform=None if job.transform is None else job.transform.of_block(index),
            states=states,
            batch_size=job.batch_size,
            seed=job.settings.seed + index,
            device=job.device,
            max_bytes=job.max_bytes,
            fisher=self._state.fisher(index) if self._state.fisher_measured else None,
        )

    def _begin(self, calibration: Calibration | None) -> BlockStates | None:
        """Round the tables, and take hidden states to the first block to be tuned; None where no block needs them."""
        if calibration is None:
            self._round_outside(None)
            return None
        if self._job.checkpoint.task in PAIRS:
            return self._begin_halves(calibration)
        job, model = self._job, self._job.weights
        ids, stack = torch.from_numpy(calibration.ids), job.plan.stack
        distinct, earlier = model.distinct(ids), self._state.hidden()
        if earlier is not None:
            mask = loss_mask(job.checkpoint, ids, earlier.floats.shape[1])
            with model.embedding(distinct, model.token_rows(distinct)), model.streamed_forward():
                return BlockStates(capture_calls(model.model, stack, ids), mask, earlier)
        floats, rounded, others = self._round_outside(calibration, distinct)
        with model.embedding(distinct, floats):
            with model.streamed_forward():
                calls = capture_calls(model.model, stack, ids)
            _, length, width = first_hidden(model.model, stack, ids[:1], 1).shape
            hidden = self._state.begin_hidden(0, (len(ids), length, width))
            first_hidden(model.model, stack, ids, job.batch_size, hidden.floats, hidden.drop)
        del floats  # as many rows as the calibration ids have of a large vocabulary
        with model.replaced(others), model.embedding(distinct, rounded):
            first_hidden(model.model, stack, ids, job.batch_size, hidden.quantized, hidden.drop)
        return BlockStates(calls, loss_mask(job.checkpoint, ids, length), hidden)

    def _begin_halves(self, calibration: Calibration) -> BlockStates:
        """The same of a model with an encoder and a decoder, which is whole in memory."""
        if not self._state.blocks_done:
            self._round_outside(calibration)
        self._halves = HalfStates(self._job, self._state, calibration, self._tables.values())
        return self._halves.begin()

    def _round_outside(
        self, calibration: Calibration | None, ids: Tensor = NO_ROWS
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Round what lies outside the blocks, and record it; what that takes, as sums for lm_head, ends with it.

        Returns:
            Rows of the token embedding for ``ids``, float and as rounded; the other values that are in memory, by name.
        """
        tables = dataclasses.replace(self._tables, own=head_rounding(self._job, calibration, self._progress))
        floats, rounded = tables.embedding(ids)
        others = tables.others()
        self._writer.sync()
        self._state.record_layers([info.name for info in self._job.plan.tables])
        return floats, rounded, others

    def _tune(self, index: int, states: BlockStates | None) -> BlockStates | None:
        """Tune one block and record it; returns what enters the next one."""
        name, last = self._job.plan.stack.block_name(index), index + 1 == len(self._job.plan.stack.blocks)
        before, after, task_states = None, None, None
        crosses = self._halves is not None and self._halves.ends_encoder(index)
        if states is not None:
            before = states.hidden
            after = self._halves.leaving(before) if self._halves and crosses else self._next_hidden(before, index)
            needed = not last and self._job.reads_quantized
            task_states = TaskStates(states.calls[index], states.mask, before.path, after.path, needed)
        with self._progress.block(name) as report:
            context = BlockContext(self._job.weights, before, after, report, self._parts)
            tuned = run_task(self.task(index, task_states), context)
            self._write(index, tuned)
            losses = (tuned.loss_before, tuned.loss_after)
            of_layers = {f"{name}.{linear}": tuned.layer_losses.get(linear, losses) for linear in tuned.layers}
            entering = None if states is None or after is None else BlockStates(states.calls, states.mask, after)
            if self._halves and crosses and entering is not None:
                entering = self._halves.crossed(entering.hidden, entering.calls[index])
            self._state.record_block(of_layers, None if last or entering is None else entering.hidden)
        self._progress.block_done(name, *losses, tuned.note)
        return entering

    def _next_hidden(self, hidden: Hidden, index: int) -> Hidden:
        samples, length, width = hidden.floats.shape
        return self._state.begin_hidden(index + 1, (samples, length, width))

    def _write(self, index: int, tuned: TunedBlock) -> None:
        """What became of a block, into the artifact; synced."""
        prefix = f"{self._job.plan.stack.block_name(index)}."
        changed = {f"{prefix}{name}": tensor for name, tensor in tuned.overrides.items()}
        self._add_overrides(changed)
        self._state.record_overrides(index, changed)
        for name, vector in tuned.vectors.items():
            self._writer.add_override(f"{prefix}{name}", vector)
        for name, linear in tuned.layers.items():
            self._writer.add(f"{prefix}{name}", linear)
        self._writer.sync()

    def _add_overrides(self, changed: Mapping[str, Tensor]) -> None:
        for name, tensor in changed.items():
            self._writer.add_override(name, tensor.numpy())
