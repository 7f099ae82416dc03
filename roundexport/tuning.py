"""`tune`: from a float model to an artifact of integers, block by block, resumable.

    load ─ plan ─ calibration samples ─ tables by rounding ─ for every block ─ manifest ─ rename into place
                                                              │
        target = block(floats)          hidden states of the float model, one block further
        tune_block(...)                 the algorithm: integers for the block's linears
        quantised = block with those integers (quantised)
        write integers, write both hidden states, record        (tunestate.py: a run that was killed goes on from here)

Hidden states are float32 in main memory, [samples, length, H] three times; weights are float32 for the whole model.
``device`` computes blocks elsewhere (cuda, xpu) along the same path; only cpu has been measured.
Same model, settings, library versions and kind of machine, same bytes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from . import discovery
from .algorithms import rtn
from .artifact import ArtifactWriter, artifact_source
from .atomic import write_folder
from .blocks import BlockCall, BlockInputs, BlockResult, capture_calls, first_hidden, run_all, weight_of
from .calibration import Calibration, load_calibration, text_digest
from .checkpoint import Checkpoint
from .errors import Interrupted, UsageError
from .recipes import resolve
from .settings import TuneSettings
from .tuneplan import Plan, make_plan
from .tuneprogress import Progress, estimate
from .tunestate import TuneState, open_state

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
        UnsupportedError: the model has no blocks that can be tuned one at a time.
        WontFitError: the disk is full.
        Interrupted: on Ctrl-C; the same call goes on.
    """
    settings = settings or TuneSettings()
    out = Path(out)
    if os.path.lexists(out):
        raise UsageError(f"{out} exists already; remove it or name another folder")
    composition = resolve(settings)
    method = discovery.load("algorithms", composition.algorithm)
    options = _method_settings(method, settings)
    where = _device(settings.device)
    checkpoint = Checkpoint.open(model)
    float_model = checkpoint.load_model().requires_grad_(False)
    plan = make_plan(float_model, settings)
    key = {
        "model": checkpoint.digest,
        "algorithm": {"name": composition.algorithm, "settings": dataclasses.asdict(options)},
        "linears": settings.spec().to_json(),
        "embedding_bits": settings.embedding_bits,
        "calibration": _request_identity(settings) if method.NEEDS_CALIBRATION else None,
        "device": where.type,
        "versions": _versions(),
    }
    with open_state(out, key, resume) as state, Progress(progress) as shown:
        job = _Job(checkpoint, float_model, plan, method, options, where, settings)
        try:
            _run(job, state, shown)
            state.publish(out)
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
    model: nn.Module
    plan: Plan
    method: ModuleType
    options: Any
    device: torch.device
    settings: TuneSettings

    @property
    def batch_size(self) -> int:
        """Samples that go through a block at a time."""
        return min(self.settings.batch_size, self.settings.num_samples)


def _run(job: _Job, state: TuneState, shown: Progress) -> None:
    calibration = _calibration(job, state, shown) if job.method.NEEDS_CALIBRATION else None
    writer = ArtifactWriter(state.artifact, job.plan.layers, state.layers_done)
    try:
        chain = _begin(job, state, writer, calibration)
        _announce(job, state, chain, shown)
        for index in range(state.blocks_done, len(job.plan.stack.blocks)):
            _tune_block(job, state, writer, chain, index, shown)
        writer.finish(
            source=artifact_source(job.checkpoint),
            algorithm={
                "name": job.method.__name__.rpartition(".")[2],
                "settings": {**dataclasses.asdict(job.options), "seed": job.settings.seed, "device": job.device.type},
            },
            calibration={"kind": "none"} if calibration is None else calibration.identity,
            kept_float=job.plan.kept_float,
            versions=_versions(),
            losses=state.losses,
            side_files=job.checkpoint.copy_side_files(state.artifact),
        )
    finally:
        writer.close()


def _calibration(job: _Job, state: TuneState, shown: Progress) -> Calibration:
    """The samples the run was begun with, or new ones."""
    found = state.calibration()
    if found is None:
        asked = job.settings
        shown.say(f"getting calibration samples: {asked.calibration}")
        found = load_calibration(
            job.checkpoint,
            asked.calibration,
            num_samples=asked.num_samples,
            sample_len=asked.sample_len,
            seed=asked.seed,
            model=job.model,
        )
        state.record_calibration(found)
    for note in found.notes:
        shown.say(f"note: {note}")
    return found


@dataclass(eq=False)
class _Chain:
    """Hidden states on their way through the blocks.

    Args:
        calls: how each block is called.
        mask: [samples, length], positions that count.
        quantised: what enters the next block through those that are quantised, [samples, length, H].
        floats: what enters it in the float model.
    """

    calls: list[BlockCall]
    mask: Tensor
    quantised: Tensor
    floats: Tensor


def _begin(job: _Job, state: TuneState, writer: ArtifactWriter, calibration: Calibration | None) -> _Chain | None:
    """Round the tables, and take hidden states to the first block to be tuned; None where no block needs them."""
    if state.blocks_done == len(job.plan.stack.blocks):
        return None  # an earlier run was stopped between its last block and its end
    if calibration is None:
        _round_tables(job, state, writer)
        return None
    ids, stack = torch.from_numpy(calibration.ids), job.plan.stack
    calls, mask = capture_calls(job.model, stack, ids), _mask(job.checkpoint, ids)
    earlier = state.hidden()
    if earlier is not None:
        return _Chain(calls, mask, *earlier)
    floats = first_hidden(job.model, stack, ids, job.batch_size)
    _round_tables(job, state, writer)
    return _Chain(calls, mask, first_hidden(job.model, stack, ids, job.batch_size), floats)


def _round_tables(job: _Job, state: TuneState, writer: ArtifactWriter) -> None:
    """Quantise token embedding and lm_head, in the artifact and in the model: blocks are tuned behind them."""
    specs = {info.name: spec for info, spec in job.plan.layers}
    for info in job.plan.tables:
        weight = weight_of(job.model.get_submodule(info.name))
        rounded = rtn.quantize(weight, specs[info.name])
        weight.copy_(torch.from_numpy(rounded.dequantize()))
        writer.add(info.name, rounded)
    writer.sync()
    state.record_layers([info.name for info in job.plan.tables])


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
    scheme = next(iter(job.plan.block_specs[0].values())).describe()
    text = f"{len(job.plan.layers)} layers in {count} blocks, {scheme}"
    if state.blocks_done:
        text += f", {state.blocks_done} blocks done before"
    if chain is not None and left:
        block, call = job.plan.stack.blocks[state.blocks_done].to(job.device), chain.calls[state.blocks_done]
        per_block = job.options.cost(len(chain.mask)) + 2 * len(chain.mask)
        text += f"; {estimate(block, call, chain.quantised, job.batch_size, job.device, per_block * left)}"
    shown.say(text)


def _tune_block(
    job: _Job, state: TuneState, writer: ArtifactWriter, chain: _Chain | None, index: int, shown: Progress
) -> None:
    """Tune one block, write its integers, take the hidden states through it, and record all of that."""
    stack = job.plan.stack
    name, block = stack.block_name(index), stack.blocks[index].to(job.device)
    with shown.block(name) as report:
        inputs = None if chain is None else _inputs(job, chain, block, index, report)
        result: BlockResult = job.method.tune_block(block, inputs, job.plan.block_specs[index], job.options)
        for linear, quantised in result.layers.items():
            writer.add(f"{name}.{linear}", quantised)
        writer.sync()
        last = index + 1 == len(stack.blocks)
        if inputs is not None and chain is not None and not last:
            weights = {n: torch.from_numpy(q.dequantize()).to(job.device) for n, q in result.layers.items()}
            chain.quantised = run_all(block, inputs.call, chain.quantised, job.batch_size, job.device, weights)
            chain.floats = inputs.target
        losses = (result.loss_before, result.loss_after)
        hidden = None if chain is None or last else (chain.quantised, chain.floats)
        state.record_block({f"{name}.{linear}": losses for linear in result.layers}, hidden)
        block.to("cpu")
    shown.block_done(name, *losses)


def _inputs(job: _Job, chain: _Chain, block: nn.Module, index: int, report: Callable[[float], None]) -> BlockInputs:
    call = chain.calls[index]
    return BlockInputs(
        call=call,
        quantised=chain.quantised,
        floats=chain.floats,
        target=run_all(block, call, chain.floats, job.batch_size, job.device),
        mask=chain.mask,
        seed=job.settings.seed + index,
        device=job.device,
        report=report,
    )


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
