"""Memory limits of a tuning run: estimates are printed, and steps that exceed ``max_ram`` are refused.

Blocks are tuned one at a time and need little memory, so their estimate is only printed (cost_model.py).  Work that
replays the model holds the inputs of all blocks (memory_need.py).  Two steps need the whole model in memory: a decoder
that generates its own calibration samples, and a transform that is trained on the model's output.  All of these are
refused before any of them starts.  A finisher that generates samples (end_to_end.py) skips that where the model does
not fit.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from roundexport.calibration.self_generated import WRITING_BYTES
from roundexport.environment.memory import MemoryLimit
from roundexport.errors import UnsupportedError
from roundexport.model.positions import max_positions

from .chosen_methods import ChosenBlockTransform, ChosenModelTransform
from .cost_model import Estimate, Work, estimate
from .memory_need import Replays

if TYPE_CHECKING:
    from collections.abc import Collection

    from .block_states import BlockStates
    from .checkpointing import Replay
    from .job import Job
    from .progress import Progress


def announce(job: Job, blocks_done: int, states: BlockStates | None, progress: Progress) -> None:
    """Say what will be done and what it will take.

    Args:
        job: the run.
        blocks_done: blocks that an earlier run did.
        states: hidden states that enter the next block; None where no block needs them, or none is left.
        progress: where to say it.
    """
    count, left = len(job.plan.stack.blocks), len(job.plan.stack.blocks) - blocks_done
    progress.begin(count, blocks_done)
    text = f"{len(job.plan.layers)} layers in {count} blocks, {job.plan.describe()}"
    if states is not None and job.weights.bfloat16:
        text += ", products in bfloat16"
    if blocks_done:
        text += f", {blocks_done} blocks done before"
    if left:
        text += f"; {_estimate(job, blocks_done, states).describe(job.settings.max_ram)}"
    progress.say(text)


def check_replays(job: Job, done: Collection[Replay]) -> None:
    """Work that replays the float model holds what enters every block.

    Args:
        job: the run.
        done: work that an earlier run did.

    Raises:
        WontFitError: it does not fit in ``max_ram``.
    """
    if not (job.fisher_samples or job.plan.bit_allocator or job.settings.activations):
        return
    length = min(job.settings.sample_len, max_positions(job.checkpoint))
    vocabulary = job.block_size(job.plan.stack.blocks[0], 1, 1).vocabulary
    Replays(job.plan, job.settings, job.fisher_samples, length, vocabulary).check(done)


def check_writing(job: Job) -> None:
    """Writing samples takes every layer for every token, so the model must fit as a whole.

    Raises:
        WontFitError: it does not fit in ``max_ram``.
    """
    MemoryLimit(job.settings.max_ram).check(
        "calibration self, for which the model writes its samples,",
        {"the model as float32": _float32_bytes(job), "caches and logits": WRITING_BYTES},
        advice="give a text file (--calibration FILE), which takes one block at a time, or a larger max_ram",
    )


def check_training(job: Job) -> None:
    """A transformation that is trained on the whole model needs a decoder, and memory.

    Raises:
        UnsupportedError: the model is not a decoder.
        WontFitError: it does not fit in ``max_ram``.
    """
    if not isinstance(job.transform, ChosenModelTransform):
        return
    if job.checkpoint.task != "generate":
        raise UnsupportedError(
            f"transform {job.transform.name} trains on what the model says next, which only decoders do; use teq"
        )
    own = _float32_bytes(job) if job.weights.streamed else 0
    MemoryLimit(job.settings.max_ram).check(
        f"transform {job.transform.name}, which trains the whole model in memory,",
        {
            "the model as float32": own,
            "its training": job.transform.bytes_held(job.model, job.settings.sample_len),
        },
        advice="use teq, which takes one block at a time, a smaller batch_size or sample_len, or a larger max_ram",
    )


def _float32_bytes(job: Job) -> int:
    return 4 * sum(parameter.numel() for parameter in job.model.parameters())


def _estimate(job: Job, blocks_done: int, states: BlockStates | None) -> Estimate:
    """Time and memory of the blocks that are left, and of the tables where they are rounded along with them."""
    methods = [job.rounding.settings]
    if isinstance(job.transform, ChosenBlockTransform):  # the other kind was trained before
        methods.append(job.transform.settings)
    if job.finisher is not None:
        methods.append(job.finisher.settings)
    samples, length = (0, 0) if states is None else states.mask.shape
    tables = 0 if states is not None else sum(info.in_features * info.out_features for info in job.plan.tables)
    count, since = len(job.plan.stack.blocks), time.monotonic()
    with job.weights.block(blocks_done, job.device) as block:
        reading, batch = time.monotonic() - since, None
        if states is not None:
            batch = states.calls[blocks_done], states.hidden.quantized[: job.batch_size].to(job.device)
        work = Work.of(methods, job.block_size(block, samples, length), 2 if job.reads_quantized else 1)
        return estimate(block, work, count - blocks_done, reading, tables, batch)
