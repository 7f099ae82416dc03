"""`tune`: from a float model to an artifact of integers, block by block, resumable.

    skeleton ─ plan ─ calibration samples ─ tables by rounding ─ for every block ─ manifest ─ rename into place
                                                                  │
        read the block's weights        streamed_model.py: one block at a time; tables in parts (table_rounding.py)
        target = block(floats)          block_states.py: hidden states of the float model, one block further
        transform_block(...)            where asked for: an equivalent block that rounds better (chosen_methods.py);
                                        what is trained on the whole model was trained before the tables were rounded
        tune_block(...)                 the algorithm: integers for the block's linears
        write integers
        quantized = block with those integers (quantized)
        record, drop the weights        checkpointing.py: a run that was killed goes on from here

job.py makes methods and plan of what was asked for; limits.py says, before the blocks, what they will take.
Hidden states are float32 [samples, length, H] in mapped files (hidden_states.py): those before a block and those behind
it, each through both prefixes.  In memory are one block's weights, what the algorithm needs for it, and one batch.
``device`` computes blocks elsewhere (cuda, xpu) along the same path; only cpu has been measured.
Linears in blocks multiply in bfloat16 where the device has it (bf16_linears.py).
Same model, settings, library versions and kind of machine, same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from roundexport.algorithms.interface import BlockInputs, BlockResult
from roundexport.calibration.loss_mask import loss_mask
from roundexport.calibration.samples import Calibration, load_calibration
from roundexport.errors import Interrupted
from roundexport.formats.artifact_writer import ArtifactWriter
from roundexport.model.artifact_source import artifact_source
from roundexport.model.block_call import capture_calls, first_hidden
from roundexport.model.torch_threads import torch_threads
from roundexport.schemes.allocate import BitAllocation
from roundexport.schemes.rules import rows
from roundexport.versions import library_versions

from .block_states import BlockStates
from .checkpointing import TuneState, open_state
from .chosen_methods import shares
from .job import Job
from .limits import announce, check_training, check_writing
from .progress import Progress
from .settings import TuneSettings
from .state_folder import refuse_existing
from .table_rounding import round_embedding, round_other_tables, round_vectors
from .whole_model import Samples, finish_artifact


def tune(
    model: str | Path,
    out: str | Path,
    settings: TuneSettings | None = None,
    *,
    resume: bool = True,
    progress: bool = True,
) -> Path:
    """Tune a model's rounding and write the artifact.

    Args:
        model: Hugging Face model folder or hub id.
        out: artifact folder to make.  While it grows it is ``<out>.partial``, from which an interrupted run goes on.
        settings: how to tune; None: the defaults of :class:`TuneSettings`.
        resume: go on from ``<out>.partial`` where an earlier run left it; False begins anew.
        progress: report on stderr.

    Returns:
        The artifact folder.

    Raises:
        UsageError: a setting makes no sense, ``out`` exists, or the state in ``<out>.partial`` has other settings.
        SpecError: the group size does not divide a layer's K (named).
        CheckpointError: the model cannot be read, or holds weights that are not finite (named).
        UnsupportedError: the model has no blocks that can be tuned one at a time, or is no decoder where it must be.
        WontFitError: the disk is full, or the model cannot write its own samples, or be trained whole, within
            ``max_ram``.
        Interrupted: on Ctrl-C; the same call goes on.
    """
    out = Path(out)
    refuse_existing(out)
    job = Job.of(model, settings or TuneSettings())
    with torch_threads() as threads, open_state(out, job.key(), resume) as state, Progress(progress) as shown:
        shown.say(f"computing with {threads}")
        if needed := getattr(job.method, "SETTINGS_OVERRIDES", {}):
            shown.say(f"{job.algorithm} sets {', '.join(f'{name} {value}' for name, value in needed.items())}")
        try:
            _run(job, state, shown)
            state.publish(out, _finish(job, state, shown))
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"stopped after {state.blocks_done} of {len(job.plan.stack.blocks)} blocks; "
                f"run the same command again to go on from {state.folder}"
            ) from error
        except Exception:
            if not state.layers_done:  # nothing worth keeping
                state.discard()
            raise
    return out


def _run(job: Job, state: TuneState, shown: Progress) -> None:
    if state.factors() is None:
        check_training(job)
    calibration = _calibration(job, state, shown) if job.needs_samples else None
    shown.table(rows([decision for decision in job.plan.decisions if decision.by != "default"]))
    job = _trained(_mixed(job, state, calibration, shown), state, calibration, shown)
    writer = ArtifactWriter(state.artifact, job.plan.layers, state.layers_done)
    try:
        states = calibration if job.needs_states else None
        if states is None:
            announce(job, state.blocks_done, None, shown)
        chain = _begin(job, state, writer, states)
        for index in range(-1, state.blocks_done):  # done before, but only finishing writes them
            changed = state.overrides(index)
            _add_overrides(writer, changed)
            round_vectors(job, writer, index, changed)
        if states is not None:
            announce(job, state.blocks_done, chain, shown)
        for index in range(state.blocks_done, len(job.plan.stack.blocks)):
            _tune_block(job, state, writer, chain, index, shown)
        writer.finish(
            source=artifact_source(job.checkpoint),
            algorithm={"name": job.algorithm, "settings": job.recorded(state.bit_allocation)},
            calibration={"kind": "none"} if calibration is None else calibration.identity,
            kept_float=job.plan.kept_float,
            versions=library_versions(),
            losses=state.losses,
            side_files=job.checkpoint.copy_side_files(state.artifact),
        )
    finally:
        writer.close()


def _finish(job: Job, state: TuneState, shown: Progress) -> Path | None:
    """Tune the artifact of the blocks as a whole where that was asked for; returns the folder of what it became."""
    calibration = state.calibration()
    if job.finish is None or calibration is None:
        return None
    ids, out = torch.from_numpy(calibration.ids), state.folder / "finished"
    samples = Samples(ids, loss_mask(job.checkpoint, ids), job.settings.seed)
    with shown.block(job.finish.name) as report:
        losses = finish_artifact(job.finish, job.weights, state.artifact, out, samples, job.device, report)
    for before, after in losses:
        shown.block_done(job.finish.name, before, after)
    return out


def _mixed(job: Job, state: TuneState, calibration: Calibration | None, shown: Progress) -> Job:
    """The run with bits chosen per layer, where that was asked for; recorded, as times measured anew would differ."""
    if job.plan.bit_allocator is None or calibration is None:
        return job
    allocation = None if state.bit_allocation is None else BitAllocation.from_json(state.bit_allocation)
    if allocation is None:
        allocation = job.plan.bit_allocator.choose(
            job.weights, torch.from_numpy(calibration.ids), job.device, shown.say
        )
        state.record_bit_allocation(allocation.to_json())
        shown.table(allocation.table())
    return dataclasses.replace(job, plan=job.plan.with_specs(allocation.specs()))


def _trained(job: Job, state: TuneState, calibration: Calibration | None, shown: Progress) -> Job:
    """The run with what a transformation of the whole model learned, where that was asked for; trained once."""
    if job.transform is None or not job.transform.whole or calibration is None:
        return job
    factors = state.factors()
    if factors is not None:
        return dataclasses.replace(job, transform=dataclasses.replace(job.transform, factors=factors))
    ids, name = torch.from_numpy(calibration.ids), job.transform.name
    model = (job.checkpoint.load_model() if job.weights.streamed else job.model).requires_grad_(False).to(job.device)
    expected = job.transform.estimate(model, ids).describe(job.settings.max_ram)
    shown.say(f"{name}: all blocks at once, the whole model in memory; {expected}")
    with shown.whole(name) as report:
        transform = job.transform.train(model, ids, job.plan.block_specs, job.settings.seed, report)
    model.to("cpu")
    if transform.factors is not None:
        state.record_factors(transform.factors)
        shown.block_done(name, transform.factors.loss_before, transform.factors.loss_after)
    return dataclasses.replace(job, transform=transform)


def _calibration(job: Job, state: TuneState, shown: Progress) -> Calibration:
    """The samples the run was begun with, or new ones."""
    found = state.calibration()
    if found is None:
        asked = job.settings
        shown.say(f"getting calibration samples: {asked.calibration}")
        if asked.calibration == "self" and job.checkpoint.task == "generate":
            check_writing(job)
        found = load_calibration(
            job.checkpoint,
            asked.calibration,
            num_samples=asked.num_samples,
            sample_len=asked.sample_len,
            seed=asked.seed,
            model=None if job.weights.streamed else job.model,
        )
        state.record_calibration(found)
    for note in found.notes:
        shown.say(f"note: {note}")
    return found


def _begin(job: Job, state: TuneState, writer: ArtifactWriter, calibration: Calibration | None) -> BlockStates | None:
    """Round the tables, and take hidden states to the first block to be tuned; None where no block needs them."""
    if state.blocks_done == len(job.plan.stack.blocks):
        return None  # an earlier run was stopped between its last block and its end
    if calibration is None:
        round_embedding(job, writer)
        _round_tables(job, state, writer)
        return None
    ids, stack, weights = torch.from_numpy(calibration.ids), job.plan.stack, job.weights
    distinct: Tensor = ids.unique()  # type: ignore[no-untyped-call]
    mask, earlier = loss_mask(job.checkpoint, ids), state.hidden()
    if earlier is not None:
        with weights.embedding(distinct, weights.rows(weights.embedding_name, distinct)), weights.streamed_forward():
            return BlockStates(capture_calls(job.model, stack, ids), mask, earlier)
    floats, rounded = round_embedding(job, writer, distinct)
    with weights.embedding(distinct, floats):
        with weights.streamed_forward():
            calls = capture_calls(job.model, stack, ids)
        width = first_hidden(job.model, stack, ids[:1], 1).shape[-1]
        hidden = state.begin_hidden(0, (len(ids), ids.shape[1], width))
        first_hidden(job.model, stack, ids, job.batch_size, hidden.floats, hidden.drop)
    del floats  # as many rows as the calibration ids have of a large vocabulary
    _round_tables(job, state, writer)
    with weights.embedding(distinct, rounded):
        first_hidden(job.model, stack, ids, job.batch_size, hidden.quantized, hidden.drop)
    return BlockStates(calls, mask, hidden)


def _round_tables(job: Job, state: TuneState, writer: ArtifactWriter) -> None:
    """Round what else lies outside the blocks, and record it."""
    round_other_tables(job, writer)
    round_vectors(job, writer, -1)
    writer.sync()
    state.record_layers([info.name for info in job.plan.tables])


def _add_overrides(writer: ArtifactWriter, changed: Mapping[str, Tensor]) -> None:
    for name, tensor in changed.items():
        writer.add_override(name, tensor.numpy())


def _tune_block(
    job: Job, state: TuneState, writer: ArtifactWriter, chain: BlockStates | None, index: int, shown: Progress
) -> None:
    """Tune one block, write its integers, take the hidden states through it, and record all of that."""
    name, last = job.plan.stack.block_name(index), index + 1 == len(job.plan.stack.blocks)
    with shown.block(name) as report, job.weights.block(index, job.device) as block:
        inputs, after = None, None
        if chain is not None:
            samples, length, width = chain.hidden.floats.shape
            after = state.begin_hidden(index + 1, (samples, length, width))
            inputs = chain.inputs(job, block, index, after, report)
        specs, result = job.plan.block_specs[index], BlockResult({})
        if specs:
            inputs = _transform(job, state, writer, block, index, inputs)
        round_vectors(job, writer, index)
        if specs:
            result = job.method.tune_block(block, inputs, specs, job.options)
        for linear, quantized in result.layers.items():
            writer.add(f"{name}.{linear}", quantized)
        writer.sync()
        if chain is not None and after is not None and not last and not result.outputs_written:
            swapped = {n: torch.from_numpy(q.dequantize()).to(job.device) for n, q in result.layers.items()}
            chain.take_through(job, block, index, after, swapped)
        losses = (result.loss_before, result.loss_after)
        state.record_block({f"{name}.{linear}": losses for linear in result.layers}, None if last else after)
    if chain is not None and after is not None:
        chain.hidden = after
    shown.block_done(name, *losses)


def _transform(
    job: Job, state: TuneState, writer: ArtifactWriter, block: nn.Module, index: int, inputs: BlockInputs | None
) -> BlockInputs | None:
    """Transform the block where that was asked for; returns what the rounding method is given."""
    if job.transform is None or inputs is None:
        return inputs
    samples, prefix = len(inputs.mask), f"{job.plan.stack.block_name(index)}."
    before, after = shares(inputs.report, job.transform.forward_passes(samples), job.options.forward_passes(samples))
    found = job.transform.apply(block, index, dataclasses.replace(inputs, report=before), job.plan.block_specs[index])
    changed = {f"{prefix}{name}": tensor for name, tensor in found.items()}
    _add_overrides(writer, changed)
    state.record_overrides(index, changed)
    return dataclasses.replace(inputs, report=after)
