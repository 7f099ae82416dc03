"""`tune`: from a float model to an artifact of integers, block by block, resumable.

    skeleton ─ plan ─ calibration samples ─ tables by rounding ─ for every block ─ manifest ─ rename into place
                                                                  │
        read the block's weights        streaming.py: one block at a time; tables in parts
        target = block(floats)          hidden states of the float model, one block further
        transform_block(...)            where asked for: an equivalent block that rounds better (transforming.py);
                                        what is trained on the whole model was trained before the tables were rounded
        tune_block(...)                 the algorithm: integers for the block's linears
        write integers
        quantised = block with those integers (quantised)
        record, drop the weights        tunestate.py: a run that was killed goes on from here

Hidden states are float32 [samples, length, H] in mapped files (hidden.py): those before a block and those behind it,
each through both prefixes.  In memory are one block's weights, what the algorithm needs for it, and one batch.
``device`` computes blocks elsewhere (cuda, xpu) along the same path; only cpu has been measured.
Same model, settings, library versions and kind of machine, same bytes.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from . import discovery
from .algorithms import rtn
from .artifact import ArtifactWriter, artifact_source
from .atomic import write_folder
from .blocks import BlockCall, BlockInputs, BlockResult, BlockSize, capture_calls, first_hidden, run_all, weight_of
from .calibration import Calibration, load_calibration, text_digest
from .checkpoint import Checkpoint
from .errors import Interrupted, UnsupportedError, UsageError, WontFitError
from .estimating import Estimate, Work, estimate
from .finishing import Finish, Samples, finish_artifact, load_finish
from .hidden import Hidden, drop
from .mixing import Mix
from .recipes import resolve
from .rules import read_rules, rows
from .settings import TuneSettings
from .streaming import Weights
from .transforming import Transform, load_transform, shares
from .tuneplan import Plan, make_plan
from .tuneprogress import Progress
from .tunestate import TuneState, open_state
from .tunetables import NO_ROWS, Quantize, round_table
from .vectors import Vector8

_WRITING_GIB = 1.0  # beside its weights, while a model writes samples: keys and values, and the program itself
_VERSIONS = ("roundexport", "torch", "transformers", "numpy")


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
    settings = settings or TuneSettings()
    out = Path(out)
    if os.path.lexists(out):
        raise UsageError(f"{out} exists already; remove it or name another folder")
    composition = resolve(settings)
    method = discovery.load("algorithms", composition.algorithm)
    settings = dataclasses.replace(settings, **getattr(method, "IMPLIES", {}))
    # Steps asked for are those of the longest part: the finish where there is one.
    options = _method_settings(method, dataclasses.replace(settings, steps=None) if composition.finish else settings)
    transform = load_transform(composition.transform, lambda module: _method_settings(module, settings))
    finish = load_finish(composition.finish, lambda module: _method_settings(module, settings))
    where = _device(settings.device)
    checkpoint = Checkpoint.open(model)
    weights = Weights(checkpoint)
    plan = make_plan(weights.model, settings, weights.all_parts())
    key = {
        "model": checkpoint.digest,
        "algorithm": {"name": composition.algorithm, "settings": dataclasses.asdict(options)},
        "linears": settings.spec().to_json(),
        "rules": _rules(settings),
        "mix": _mix_request(settings),
        "embedding_bits": settings.embedding_bits,
        "everything": settings.everything,
        "transform": None if transform is None else transform.to_json(),
        "finish": None if finish is None else finish.to_json(),
        "calibration": _request_identity(settings)
        if method.NEEDS_CALIBRATION or transform or plan.mixer or finish
        else None,
        "device": where.type,
        "versions": _versions(),
    }
    with open_state(out, key, resume) as state, Progress(progress) as shown:
        job = _Job(checkpoint, weights, plan, method, options, transform, finish, where, settings)
        try:
            _run(job, state, shown)
            state.publish(out, _finish(job, state, shown))
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"stopped after {state.blocks_done} of {len(plan.stack.blocks)} blocks; "
                f"run the same command again to go on from {state.folder}"
            ) from error
        except Exception:
            if not state.layers_done:  # nothing worth keeping
                state.discard()
            raise
    return out


def _method_settings(method: ModuleType, settings: TuneSettings) -> Any:
    """A method's Settings, with what the user gave for the fields it has."""
    given = {"steps": settings.steps, "batch_size": settings.batch_size}
    fields = {field.name for field in dataclasses.fields(method.Settings)}
    return method.Settings(**{name: value for name, value in given.items() if name in fields and value is not None})


def write_float_artifact(model: str | Path, out: str | Path) -> Path:
    """Write an artifact that quantises nothing, from which targets make the float package they are compared with.

    Args:
        model: Hugging Face model folder or hub id.
        out: artifact folder to make.

    Returns:
        The artifact folder.

    Raises:
        UsageError: ``out`` exists.
        CheckpointError: the model cannot be read.
    """
    checkpoint = Checkpoint.open(model)
    weights = [name for name in checkpoint.names() if name.endswith(".weight") and len(checkpoint.shape(name)) > 1]
    with write_folder(Path(out)) as folder:
        ArtifactWriter(folder, []).finish(
            source=artifact_source(checkpoint),
            algorithm={"name": "float", "settings": {}},
            calibration={"kind": "none"},
            kept_float=[(name.removesuffix(".weight"), "nothing is quantised") for name in weights],
            versions=_versions(),
            side_files=checkpoint.copy_side_files(folder),
        )
    return Path(out)


@dataclass(frozen=True, eq=False)
class _Job:
    """Everything that stays the same during a run."""

    checkpoint: Checkpoint
    weights: Weights
    plan: Plan
    method: ModuleType
    options: Any
    transform: Transform | None
    finish: Finish | None
    device: torch.device
    settings: TuneSettings

    @property
    def model(self) -> nn.Module:
        """The model; parameters that are not in memory are on the meta device."""
        return self.weights.model

    @property
    def needs_states(self) -> bool:
        """Whether hidden states must be taken through the blocks."""
        return bool(self.method.NEEDS_CALIBRATION or self.transform)

    @property
    def batch_size(self) -> int:
        """Samples that go through a block at a time."""
        return min(self.settings.batch_size, self.settings.num_samples)


def _run(job: _Job, state: TuneState, shown: Progress) -> None:
    _check_whole(job, state)
    calibration = _calibration(job, state, shown) if job.needs_states or job.plan.mixer or job.finish else None
    shown.table(rows([decision for decision in job.plan.decisions if decision.by != "default"]))
    job = _trained(_mixed(job, state, calibration, shown), state, calibration, shown)
    writer = ArtifactWriter(state.artifact, job.plan.layers, state.layers_done)
    try:
        states = calibration if job.needs_states else None
        if states is None:
            _announce(job, state, None, shown)
        chain = _begin(job, state, writer, states)
        for index in range(-1, state.blocks_done):  # done before, but only finishing writes them
            changed = state.overrides(index)
            _add_overrides(writer, changed)
            _round_vectors(job, writer, index, changed)
        if states is not None:
            _announce(job, state, chain, shown)
        for index in range(state.blocks_done, len(job.plan.stack.blocks)):
            _tune_block(job, state, writer, chain, index, shown)
        writer.finish(
            source=artifact_source(job.checkpoint),
            algorithm={
                "name": job.method.__name__.rpartition(".")[2],
                "settings": _recorded_settings(job, state),
            },
            calibration={"kind": "none"} if calibration is None else calibration.identity,
            kept_float=job.plan.kept_float,
            versions=_versions(),
            losses=state.losses,
            side_files=job.checkpoint.copy_side_files(state.artifact),
        )
    finally:
        writer.close()


def _finish(job: _Job, state: TuneState, shown: Progress) -> Path | None:
    """Tune the artifact of the blocks as a whole where that was asked for; returns the folder of what it became."""
    calibration = state.calibration()
    if job.finish is None or calibration is None:
        return None
    ids, out = torch.from_numpy(calibration.ids), state.folder / "finished"
    samples = Samples(ids, _mask(job.checkpoint, ids), job.settings.seed)
    with shown.block(job.finish.name) as report:
        losses = finish_artifact(job.finish, job.checkpoint, state.artifact, out, samples, job.device, report)
    for before, after in losses:
        shown.block_done(job.finish.name, before, after)
    return out


def _mixed(job: _Job, state: TuneState, calibration: Calibration | None, shown: Progress) -> _Job:
    """The run with bits chosen per layer, where that was asked for; recorded, as times measured anew would differ."""
    if job.plan.mixer is None or calibration is None:
        return job
    mix = None if state.mix is None else Mix.from_json(state.mix)
    if mix is None:
        mix = job.plan.mixer.mix(job.weights, torch.from_numpy(calibration.ids), job.device, shown.say)
        state.record_mix(mix.to_json())
        shown.table(mix.table())
    return dataclasses.replace(job, plan=job.plan.with_specs(mix.specs()))


def _check_whole(job: _Job, state: TuneState) -> None:
    """A transformation that is trained on the whole model needs a decoder, and memory."""
    if job.transform is None or not job.transform.whole or state.factors() is not None:
        return
    if job.checkpoint.task != "generate":
        raise UnsupportedError(
            f"transform {job.transform.name} trains on what the model says next, which only decoders do; use teq"
        )
    limit, held = job.settings.max_ram, psutil.Process().memory_info().rss
    own = 4 * sum(parameter.numel() for parameter in job.model.parameters()) if job.weights.streamed else 0
    needed = (held + own + job.transform.bytes_held(job.model, job.settings.sample_len)) / 2**30
    if limit is not None and needed > limit:
        raise WontFitError(
            f"transform {job.transform.name} trains the whole model in memory, {needed:.1f} GiB; max_ram is {limit:g}."
            "  Use teq, which takes one block at a time, a smaller batch_size or sample_len, or a larger max_ram"
        )


def _trained(job: _Job, state: TuneState, calibration: Calibration | None, shown: Progress) -> _Job:
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


def _recorded_settings(job: _Job, state: TuneState) -> dict[str, Any]:
    """What the manifest says of how the artifact was tuned."""
    transform = {} if job.transform is None else {"transform": job.transform.to_json()}
    mix = {} if state.mix is None else {"mix": {**(_mix_request(job.settings) or {}), **state.mix}}
    rules = {} if job.settings.rules is None else {"rules": _rules(job.settings)}
    own = dataclasses.asdict(job.options)
    return {**own, "seed": job.settings.seed, "device": job.device.type, **transform, **mix, **rules}


def _mix_request(settings: TuneSettings) -> dict[str, Any] | None:
    """How bits are to be chosen per layer; None where they are not."""
    if not settings.mixed:
        return None
    names = ("target_bits", "choices", "cost", "target_speedup", "cost_target")
    return {name: settings.to_json()[name] for name in names}


def _rules(settings: TuneSettings) -> list[dict[str, Any]] | None:
    """The rules by content, so that a changed file is another request."""
    return None if settings.rules is None else [dataclasses.asdict(rule) for rule in read_rules(settings.rules)]


def _calibration(job: _Job, state: TuneState, shown: Progress) -> Calibration:
    """The samples the run was begun with, or new ones."""
    found = state.calibration()
    if found is None:
        asked = job.settings
        shown.say(f"getting calibration samples: {asked.calibration}")
        if asked.calibration == "self" and job.checkpoint.task == "generate":
            _check_memory(job)
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


def _check_memory(job: _Job) -> None:
    """Writing samples takes every layer for every token, so the model must fit as a whole."""
    limit = job.settings.max_ram
    needed = 4 * sum(parameter.numel() for parameter in job.model.parameters()) / 2**30 + _WRITING_GIB
    if limit is not None and needed > limit:
        raise WontFitError(
            f"calibration self: the model writes its samples, which takes all of it in memory, {needed:.1f} GiB; "
            f"max_ram is {limit:g}.  Give a text file, which takes one block at a time, or a larger max_ram"
        )


@dataclass(eq=False)
class _Chain:
    """Hidden states on their way through the blocks.

    Args:
        calls: how each block is called.
        mask: [samples, length], positions that count.
        hidden: what enters the next block.
    """

    calls: list[BlockCall]
    mask: Tensor
    hidden: Hidden


def _begin(job: _Job, state: TuneState, writer: ArtifactWriter, calibration: Calibration | None) -> _Chain | None:
    """Round the tables, and take hidden states to the first block to be tuned; None where no block needs them."""
    if state.blocks_done == len(job.plan.stack.blocks):
        return None  # an earlier run was stopped between its last block and its end
    if calibration is None:
        _round_embedding(job, writer, NO_ROWS)
        _round_tables(job, state, writer)
        return None
    ids, stack, weights = torch.from_numpy(calibration.ids), job.plan.stack, job.weights
    distinct: Tensor = ids.unique()  # type: ignore[no-untyped-call]
    mask, earlier = _mask(job.checkpoint, ids), state.hidden()
    if earlier is not None:
        with weights.embedding(distinct, weights.rows(weights.embedding_name, distinct)), weights.passing():
            return _Chain(capture_calls(job.model, stack, ids), mask, earlier)
    floats, rounded = _round_embedding(job, writer, distinct)
    with weights.embedding(distinct, floats):
        with weights.passing():
            calls = capture_calls(job.model, stack, ids)
        width = first_hidden(job.model, stack, ids[:1], 1).shape[-1]
        hidden = state.begin_hidden(0, (len(ids), ids.shape[1], width))
        first_hidden(job.model, stack, ids, job.batch_size, hidden.floats, hidden.drop)
    del floats  # as many rows as the calibration ids have of a large vocabulary
    _round_tables(job, state, writer)
    with weights.embedding(distinct, rounded):
        first_hidden(job.model, stack, ids, job.batch_size, hidden.quantised, hidden.drop)
    return _Chain(calls, mask, hidden)


def _round_embedding(job: _Job, writer: ArtifactWriter, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise the token embedding, in the artifact; returns its rows for ``ids``, as they were and as they became."""
    for info, spec in job.plan.layers:
        if f"{info.name}.weight" == job.weights.embedding_name:
            found = round_table(job.weights, info, spec, _quantize(job), ids)
            writer.add(info.name, found.linear)
            return found.floats, found.rounded
    rows = job.weights.rows(job.weights.embedding_name, ids)
    return rows, rows


def _round_tables(job: _Job, state: TuneState, writer: ArtifactWriter) -> None:
    """Quantise what else lies outside the blocks, in the artifact and in the model: blocks are tuned behind it."""
    specs = {info.name: spec for info, spec in job.plan.layers}
    for info in job.plan.tables:
        module = job.model.get_submodule(info.name)
        if f"{info.name}.weight" == job.weights.embedding_name:
            continue
        if module.get_parameter("weight").is_meta:
            writer.add(info.name, round_table(job.weights, info, specs[info.name], _quantize(job)).linear)
            continue
        weight = weight_of(module)
        rounded = _quantize(job)(weight, specs[info.name])
        weight.copy_(torch.from_numpy(rounded.dequantize()))
        writer.add(info.name, rounded)
    _round_vectors(job, writer, -1)
    writer.sync()
    state.record_layers([info.name for info in job.plan.tables])


def _quantize(job: _Job) -> Quantize:
    """How tables are rounded: the method's own way, row by row, or to nearest."""
    found: Quantize = getattr(job.method, "quantize_table", rtn.quantize)
    return found


def _add_overrides(writer: ArtifactWriter, changed: Mapping[str, Tensor]) -> None:
    for name, tensor in changed.items():
        writer.add_override(name, tensor.numpy())


def _round_vectors(job: _Job, writer: ArtifactWriter, index: int, changed: Mapping[str, Tensor] | None = None) -> None:
    """Round the norms and biases of a block, or with -1 those outside the blocks, in the artifact and in the model.

    Args:
        job: the run.
        writer: of the artifact.
        index: the block's.
        changed: parameters that are no longer the source's, where the block is not in memory.
    """
    known = changed or {}
    stack = job.plan.stack
    prefix = f"{stack.name}." if index < 0 else f"{stack.block_name(index)}."
    for name in job.plan.vectors:
        if name.startswith(prefix) != (index < 0):
            parameter = job.model.get_parameter(name).detach()
            if parameter.is_meta or name in known:
                values = known[name] if name in known else job.weights.read(name)
            else:
                values = parameter.float().cpu()
            vector = Vector8.nearest(values.numpy())
            if not parameter.is_meta:
                parameter.copy_(torch.from_numpy(vector.values()))
            writer.add_override(name, vector)


def _mask(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """1 where a position counts: not padding and, in decoders, not the last, whose output predicts nothing."""
    config = checkpoint.config
    mask = torch.ones(ids.shape)
    pad = config.get("pad_token_id")
    if isinstance(pad, int) and pad not in (config.get("eos_token_id"), config.get("bos_token_id")):
        mask[ids == pad] = 0
    if checkpoint.task == "generate":
        mask[:, -1] = 0
    return mask


def _announce(job: _Job, state: TuneState, chain: _Chain | None, shown: Progress) -> None:
    """Say what will be done and what it will take."""
    count, left = len(job.plan.stack.blocks), len(job.plan.stack.blocks) - state.blocks_done
    shown.begin(count, state.blocks_done)
    text = f"{len(job.plan.layers)} layers in {count} blocks, {job.plan.describe()}"
    if state.blocks_done:
        text += f", {state.blocks_done} blocks done before"
    if left:
        text += f"; {_estimate(job, state, chain, left).describe(job.settings.max_ram)}"
    shown.say(text)


def _estimate(job: _Job, state: TuneState, chain: _Chain | None, left: int) -> Estimate:
    """Time and memory of the blocks that are left, and of the tables where they are rounded along with them."""
    first = [] if job.transform is None or job.transform.whole else [job.transform.options]  # whole: trained before
    methods = [*first, job.options, *([job.finish.options] if job.finish else [])]
    samples, length = (0, 0) if chain is None else chain.mask.shape
    tables = 0 if chain is not None else sum(info.in_features * info.out_features for info in job.plan.tables)
    since = time.monotonic()
    with job.weights.block(state.blocks_done, job.device) as block:
        reading, batch = time.monotonic() - since, None
        if chain is not None:
            batch = chain.calls[state.blocks_done], chain.hidden.quantised[: job.batch_size].to(job.device)
        limit = None if job.settings.max_ram is None else int(job.settings.max_ram * 2**30)
        size = dataclasses.replace(
            BlockSize.of(block, samples, length), max_bytes=limit, blocks=len(job.plan.stack.blocks)
        )
        work = Work.of(methods, size)
        return estimate(block, work, left, reading, tables, batch)


def _tune_block(
    job: _Job, state: TuneState, writer: ArtifactWriter, chain: _Chain | None, index: int, shown: Progress
) -> None:
    """Tune one block, write its integers, take the hidden states through it, and record all of that."""
    name, last = job.plan.stack.block_name(index), index + 1 == len(job.plan.stack.blocks)
    with shown.block(name) as report, job.weights.block(index, job.device) as block:
        inputs, after = (None, None) if chain is None else _inputs(job, state, chain, block, index, report)
        inputs = _transform(job, state, writer, block, index, inputs)
        _round_vectors(job, writer, index)
        result: BlockResult = job.method.tune_block(block, inputs, job.plan.block_specs[index], job.options)
        for linear, quantised in result.layers.items():
            writer.add(f"{name}.{linear}", quantised)
        writer.sync()
        if chain is not None and after is not None and not last and not result.passed:
            swapped = {n: torch.from_numpy(q.dequantize()).to(job.device) for n, q in result.layers.items()}
            _pass(job, chain, block, index, after, swapped)
        losses = (result.loss_before, result.loss_after)
        state.record_block({f"{name}.{linear}": losses for linear in result.layers}, None if last else after)
    if chain is not None and after is not None:
        chain.hidden = after
    shown.block_done(name, *losses)


def _transform(
    job: _Job, state: TuneState, writer: ArtifactWriter, block: nn.Module, index: int, inputs: BlockInputs | None
) -> BlockInputs | None:
    """Transform the block where that was asked for; returns what the rounding method is given."""
    if job.transform is None or inputs is None:
        return inputs
    samples, prefix = len(inputs.mask), f"{job.plan.stack.block_name(index)}."
    before, after = shares(inputs.report, job.transform.cost(samples), job.options.cost(samples))
    found = job.transform.apply(block, index, dataclasses.replace(inputs, report=before), job.plan.block_specs[index])
    changed = {f"{prefix}{name}": tensor for name, tensor in found.items()}
    _add_overrides(writer, changed)
    state.record_overrides(index, changed)
    return dataclasses.replace(inputs, report=after)


def _inputs(
    job: _Job, state: TuneState, chain: _Chain, block: nn.Module, index: int, report: Callable[[float], None]
) -> tuple[BlockInputs, Hidden]:
    """What the algorithm is given, and the hidden states behind the block, of which the float ones are there."""
    before, (samples, length, width) = chain.hidden, chain.hidden.floats.shape
    after = state.begin_hidden(index + 1, (samples, length, width))
    # A transformation needs the target; and 8-bit norms, which a block gets next, are not the float model's.
    fills = getattr(job.method, "FILLS_TARGET", False) and job.transform is None and not job.plan.vectors
    if not fills:
        _pass(job, chain, block, index, after)

    def reported(share: float) -> None:
        report(share)
        drop(before, after)

    inputs = BlockInputs(
        call=chain.calls[index],
        quantised=before.quantised,
        floats=before.floats,
        target=after.floats,
        mask=chain.mask,
        seed=job.settings.seed + index,
        device=job.device,
        report=reported,
        target_known=not fills,
        behind=after.quantised,
        max_bytes=None if job.settings.max_ram is None else int(job.settings.max_ram * 2**30),
    )
    return inputs, after


def _pass(
    job: _Job, chain: _Chain, block: nn.Module, index: int, after: Hidden, weights: dict[str, Tensor] | None = None
) -> None:
    """Take hidden states through a block: the float ones, or with quantised ``weights`` the quantised ones."""
    before = chain.hidden
    source, out = (before.floats, after.floats) if weights is None else (before.quantised, after.quantised)
    call, size = chain.calls[index], job.batch_size
    run_all(block, call, source, size, job.device, weights, out, done=lambda: drop(before, after))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises for a device it lacks
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"device {name!r} cannot be used: {reason}; use cpu, or cuda or xpu where torch has it"
        ) from error
    return device


def _request_identity(settings: TuneSettings) -> dict[str, Any]:
    """The request for calibration samples, a file by its content."""
    source = settings.calibration
    if source != "self" and Path(source).is_file():
        source = text_digest(Path(source))
    return {
        "source": source,
        "num_samples": settings.num_samples,
        "sample_len": settings.sample_len,
        "seed": settings.seed,
    }


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _VERSIONS}
