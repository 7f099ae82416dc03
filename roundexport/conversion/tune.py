"""`tune` as Python and the command line call it: the tuning run (tuning/run.py), with who writes its text decided.

    calibration text "self"   a decoder's package of 8 bits, or of 4 where those do not fit, on a runtime where that
                              saves time (package_writer.py: enough to write, and the exporter of a target installed),
                              else the model in torch

The tuning room may not know targets, so the writer is handed down from here, the one place where it is chosen: tune,
convert and both command lines give the same text for the same settings on the same installation.  Which of the two
wrote is in the artifact's manifest (calibration: source, instead_of) and, where the package could not, said aloud.
"""

from __future__ import annotations

from pathlib import Path

from roundexport.cluster.opening import open_cluster
from roundexport.errors import UsageError
from roundexport.model.checkpoint import Checkpoint
from roundexport.progress import Progress
from roundexport.tuning import run
from roundexport.tuning.settings import TuneSettings

from .encoder_recipes import check, is_encoder_recipe, make_artifact
from .package_writer import PackageWriter


def tune(
    model: str | Path,
    out: str | Path,
    settings: TuneSettings | None = None,
    *,
    cluster: str | None = None,
    resume: bool = True,
    progress: bool | Progress = True,
) -> Path:
    """Tune a model's rounding and write the artifact.

    Args:
        model: Hugging Face model folder, GGUF file or hub id.
        out: artifact folder to make.  While it grows it is ``<out>.partial``, from which an interrupted run goes on.
        settings: how to tune; None: the defaults of :class:`TuneSettings`.
        cluster: workers that share the work, as ``local:2``, ``auto`` or ``ray://HOST`` (docs/cluster.md); the bytes
            are the same.  None: this process alone.
        resume: go on from ``<out>.partial`` if an earlier run left it; False begins again.
        progress: report on stderr, or where to report.

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
    if settings is not None and is_encoder_recipe(settings):
        if settings.recipe == "w8a8":
            raise UsageError("recipe w8a8 quantizes packages, not weights before them; take convert")
        with Progress.of(progress) as shown:
            checkpoint = Checkpoint.open(model, progress=shown, part=settings.part, max_ram=settings.max_ram)
            check(checkpoint, settings, cluster)
            make_artifact(checkpoint, Path(out), settings, shown)
        return Path(out)
    max_ram = None if settings is None else settings.max_ram
    with Progress.of(progress) as shown, open_cluster(cluster, say=shown.say, max_ram=max_ram) as workers:
        return run.tune(
            model, out, settings, writer=PackageWriter(max_ram=max_ram), workers=workers, resume=resume, progress=shown
        )
