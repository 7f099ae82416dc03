"""`tune`: from a float model to an artifact of integers, block by block, resumable.

    skeleton ─ plan ─ calibration samples ─ bits per layer ─ tables by rounding ─ every block ─ manifest ─ rename

job.py turns the settings into methods and a plan; limits.py estimates cost and checks memory; block_loop.py is the loop
over the blocks, and block_task.py the work on one block.  This file has the phases around it, in class `TuneRun`: each
takes a job and returns the next one; a job is never changed in place.

Hidden states are float32 [samples, length, H] in mapped files (hidden_states.py): those that enter a block and those
that leave it, each through the float and the quantized blocks.  In memory are one block's weights, what the algorithm
needs for it, and one batch.  ``device`` computes blocks elsewhere (cuda, xpu) along the same path; only cpu has been
measured.  Linears in blocks multiply in bfloat16 where the device has it (bf16_linears.py).
Same model, settings, library versions and kind of machine, same bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from roundexport.calibration.evenly_spread import enough_tokens
from roundexport.calibration.kept_samples import samples_once
from roundexport.calibration.loss_mask import loss_mask
from roundexport.calibration.mixture import in_words
from roundexport.calibration.samples import Calibration, load_calibration
from roundexport.calibration.self_generated import Written, written_samples
from roundexport.calibration.sounds import sounds
from roundexport.environment.versions import library_versions
from roundexport.errors import Interrupted, UnsupportedError, UsageError
from roundexport.formats.artifact_writer import ArtifactWriter
from roundexport.model.artifact_source import artifact_source
from roundexport.model.blockwise_backward import BackwardSettings
from roundexport.model.torch_threads import torch_threads
from roundexport.progress import Progress as Shown
from roundexport.schemes.activation_loss import measure
from roundexport.schemes.allocate import BitAllocation
from roundexport.schemes.rules import rows
from roundexport.types import PAIRS

from .block_loop import BlockLoop
from .checkpointing import TuneState, open_state
from .chosen_methods import ChosenModelTransform
from .disk_need import check_run
from .head_rounding import rounds_head
from .job import Job
from .limits import check_replays, check_training, check_writing
from .output_fisher import ENOUGH_TOKENS, rows_of
from .output_fisher import measure as measure_outputs
from .progress import Progress
from .settings import TuneSettings
from .state_folder import refuse_existing
from .whole_model import Place, Samples, finish_artifact

if TYPE_CHECKING:
    from torch import Tensor

    from roundexport.algorithms.interface import Factors
    from roundexport.calibration.self_generated import Writer

    from .block_task import PartsOf


def tune(
    model: str | Path,
    out: str | Path,
    settings: TuneSettings | None = None,
    *,
    writer: Writer | None,
    workers: Workers | None = None,
    resume: bool = True,
    progress: bool | Shown = True,
) -> Path:
    """Tune a model's rounding and write the artifact.

    Args:
        model: Hugging Face model folder or hub id.
        out: artifact folder to make.  While it grows it is ``<out>.partial``, from which an interrupted run goes on.
        settings: how to tune; None: the defaults of :class:`TuneSettings`.
        writer: what writes calibration text in place of the model where that is faster; None: the model does.  The
            public `tune` (conversion/tune.py) decides.
        workers: who does the parts of a block's work; None: this process.
        resume: go on from ``<out>.partial`` if an earlier run left it; False begins again.
        progress: report on stderr, or where to report.

    Returns:
        The artifact folder.

    Raises:
        UsageError: a setting makes no sense, ``out`` exists, or the state in ``<out>.partial`` has other settings.
        SpecError: the group size does not divide a layer's K (named).
        CheckpointError: the model cannot be read, or holds weights that are not finite (named).
        UnsupportedError: the model has no blocks that can be tuned one at a time, or is not a decoder where
            one is needed.
        WontFitError: the disk is full, or the model cannot write its own samples, or be trained whole, within
            ``max_ram``.
        Interrupted: on Ctrl-C; the same call goes on.
    """
    out = Path(out)
    refuse_existing(out)
    with torch_threads() as threads, Progress(progress) as reporter, reporter.stage(f"tuning {model}"):
        with reporter.stage("reading the model, checking every weight"):
            job = Job.of(model, settings or TuneSettings(), reporter.shown)
        for note in job.checkpoint.notes:
            reporter.say(f"note: {note}")
        with open_state(out, job.key(), resume) as state:
            reporter.say(f"computing with {threads}")
            if needed := job.rounding.method.scheme_needs.values():
                reporter.say(
                    f"{job.rounding.name} sets {', '.join(f'{name} {value}' for name, value in needed.items())}"
                )
            try:
                state.publish(out, TuneRun(job, state, reporter, writer, workers).run())
            except KeyboardInterrupt as error:
                raise Interrupted(
                    f"stopped after {state.blocks_done} of {len(job.plan.stack.blocks)} blocks; "
                    f"run the same command again to go on from {state.folder}"
                ) from error
            except Exception as error:
                for_good = isinstance(error, UsageError | UnsupportedError)  # who asks the same is refused again
                if not state.holds_work or (for_good and not state.layers_done):
                    state.discard()
                raise
    return out


class Workers(Protocol):
    """Processes that share the work on a block, here or elsewhere; said in words by ``str``."""

    def parts(self, folder: Path, source: str) -> PartsOf:
        """What makes them do the parts of a block's work.

        Args:
            folder: for what they hand each other; every one of them can write there, unless they have another place.
            source: folder, URL or hub id as the run was given the model.
        """


class TuneRun:
    """A tuning run; its phases follow each other in :meth:`run`.

    Args:
        job: what was asked for.
        state: what an earlier run did; grows.
        progress: where to report.
        writer: what writes calibration text in place of the model.
        workers: who does the parts of a block's work.
    """

    def __init__(
        self, job: Job, state: TuneState, progress: Progress, writer: Writer | None, workers: Workers | None = None
    ) -> None:
        self._job, self._state, self._progress, self._writer = job, state, progress, writer
        self._workers = workers

    def run(self) -> Path | None:
        """Do what is left of the run.

        Returns:
            The folder of the finished artifact, where it is another than the state's ``artifact``.
        """
        if self._state.factors() is None:
            check_training(self._job)
        check_replays(self._job, self._state.replayed)
        calibration = self._calibration() if self._job.needs_samples else None
        self._progress.table(rows([decision for decision in self._job.plan.decisions if decision.by != "default"]))
        job = self._trained(self._with_bits(self._job, calibration), calibration)
        self._measure_outputs(job, calibration)
        self._measure_activations(job, calibration)
        self._tune_blocks(job, calibration)
        return self._finished(job, calibration)

    def _calibration(self) -> Calibration:
        """The samples the run was begun with, or new ones."""
        job, settings = self._job, self._job.settings
        samples = self._state.calibration()
        if samples is None:
            asked = {"model": job.checkpoint.digest, "part": settings.part, **job.samples_asked(), **library_versions()}
            samples = samples_once(asked, self._drawn, self._waiting)
            self._state.record_calibration(samples)
        elif job.checkpoint.task in PAIRS:
            features = sounds(job.checkpoint, settings.calibration, len(samples.ids))
            samples = dataclasses.replace(samples, features=features)
        for note in samples.notes:
            self._progress.say(f"note: {note}")
        return samples

    def _waiting(self) -> AbstractContextManager[object]:
        return self._progress.stage("waiting for another run's calibration samples")

    def _drawn(self) -> Calibration:
        """New samples."""
        job, settings = self._job, self._job.settings
        with self._progress.stage(f"calibration samples: {in_words(settings.calibration)}") as stage:
            return load_calibration(
                job.checkpoint,
                settings.calibration,
                num_samples=settings.samples,
                sample_len=settings.sample_len,
                seed=settings.seed,
                model=None if job.weights.streamed else job.model,
                writer=self._writer,
                report=stage.at,
                say=self._progress.say,
                fits=functools.partial(check_writing, job),
            )

    def _with_bits(self, job: Job, calibration: Calibration | None) -> Job:
        """The job with bits chosen per layer, where the settings say so.

        The choice is recorded: kernels that are timed again would give other bits.
        """
        if job.plan.bit_allocator is None or calibration is None:
            return job
        if self._state.bit_allocation is not None:
            allocation = BitAllocation.from_json(self._state.bit_allocation)
        else:
            ids = torch.from_numpy(calibration.ids)
            allocation = job.plan.bit_allocator.choose(
                job.weights, ids, job.device, self._progress.say, rounds_head(job)
            )
            self._state.record_bit_allocation(allocation.to_json())
            self._progress.table(allocation.table())
        return dataclasses.replace(job, plan=job.plan.with_specs(allocation.specs()))

    def _trained(self, job: Job, calibration: Calibration | None) -> Job:
        """The job with the factors of a transform that is trained on the whole model, where there is one."""
        transform = job.transform
        if not isinstance(transform, ChosenModelTransform) or calibration is None:
            return job
        factors = self._state.factors()
        if factors is None:
            factors = self._train(job, transform, torch.from_numpy(calibration.ids))
            self._state.record_factors(factors)
            self._progress.block_done(transform.name, factors.loss_before, factors.loss_after)
        return dataclasses.replace(job, transform=dataclasses.replace(transform, factors=factors))

    def _train(self, job: Job, transform: ChosenModelTransform, ids: Tensor) -> Factors:
        model = (job.checkpoint.load_model() if job.weights.streamed else job.model).requires_grad_(False)
        model.to(job.device)
        expected = transform.estimate(model, ids).describe(job.settings.max_ram)
        self._progress.say(f"{transform.name}: all blocks at once, the whole model in memory; {expected}")
        with self._progress.whole(transform.name) as report:
            factors = transform.train(model, ids, job.plan.block_specs, job.settings.seed, report)
        model.to("cpu")
        return factors

    def _measure_outputs(self, job: Job, calibration: Calibration | None) -> None:
        """What an error of each output costs the model, where the rounding method looks at that."""
        if not job.fisher_samples or calibration is None or self._state.fisher_measured:
            return
        ids, rows = torch.from_numpy(calibration.ids), rows_of(job.plan)
        chosen = enough_tokens(ids, job.fisher_samples)
        shared = self._workers is not None and job.rounding.method.parted
        check_run(job, self._state, (len(ids), ids.shape[1]), shared)
        if (tokens := chosen.numel()) < ENOUGH_TOKENS:
            self._progress.say(
                f"note: what an error of each output costs is measured on {tokens:,} tokens; of fewer than "
                f"{ENOUGH_TOKENS:,} it may be worse than not known: give more or longer samples, or take recipe default"
            )
        with self._progress.stage(f"what an error of each output costs, on {len(chosen)} samples") as stage:
            settings = BackwardSettings(job.batch_size, job.settings.seed, job.device, stage.at)
            measure_outputs(job.weights, chosen, rows, settings, self._state.add_fisher)
        self._state.record_fisher()

    def _measure_activations(self, job: Job, calibration: Calibration | None) -> None:
        """What activations in 8 bits cost each layer, where that was asked for."""
        if not job.settings.activations or calibration is None or self._state.activations is not None:
            return
        layers = {info.name: (info, spec) for info, spec in job.plan.layers}
        settings = BackwardSettings(job.batch_size, job.settings.seed, job.device)
        ids = torch.from_numpy(calibration.ids)
        self._state.record_activations(measure(job.weights, ids, layers, settings, self._progress.say).to_json())

    def _tune_blocks(self, job: Job, calibration: Calibration | None) -> None:
        """Make the artifact of the blocks."""
        writer = ArtifactWriter(self._state.artifact, job.plan.layers, self._state.layers_done)
        try:
            BlockLoop(job, self._state, writer, self._progress, self._parts(job)).run(
                calibration if job.needs_states else None
            )
            writer.finish(
                source=artifact_source(job.checkpoint),
                algorithm={
                    "name": job.rounding.name,
                    "settings": job.recorded(self._state.bit_allocation, self._state.activations),
                },
                calibration={"kind": "none"} if calibration is None else calibration.identity,
                kept_float=job.plan.kept_float,
                versions=library_versions(),
                losses=self._state.losses,
                side_files=job.checkpoint.copy_side_files(self._state.artifact),
            )
        finally:
            writer.close()

    def _parts(self, job: Job) -> PartsOf | None:
        """Who does the parts of a block's work, where anybody shares it."""
        if self._workers is None:
            return None
        if not job.rounding.method.parted:
            self._progress.say(f"{job.rounding.name} is not done in parts; blocks are tuned by this process alone")
            return None
        self._progress.say(f"blocks are shared by {self._workers}")
        return self._workers.parts(self._state.folder / "parts", job.checkpoint.location)

    def _finished(self, job: Job, calibration: Calibration | None) -> Path | None:
        """Run the finisher, where there is one; returns the folder of the result."""
        finisher = job.finisher
        if finisher is None or calibration is None:
            return None
        ids, out = torch.from_numpy(calibration.ids), self._state.folder / "finished"
        samples = Samples(ids, loss_mask(job.checkpoint, ids), job.settings.seed)
        with self._progress.block(finisher.name) as report:
            place = Place(self._state.artifact, out, job.device, report)
            losses = finish_artifact(
                finisher, job.weights, samples, place, transformed=job.transform is not None, write=self._write
            )
        for before, after in losses:
            self._progress.block_done(finisher.name, before, after)
        return out

    def _write(self, count: int, length: int, seed: int) -> Written:
        """More samples that the model writes, by the same rule as the first."""
        with self._progress.stage(f"{count} more samples that the model writes") as stage:
            return written_samples(
                self._job.checkpoint, count, length, seed, writer=self._writer, report=stage.at,
                say=self._progress.say, fits=functools.partial(check_writing, self._job),
            )  # fmt: skip
