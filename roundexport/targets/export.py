"""Artifact to package: one folder that a runtime loads, written aside and renamed when the proof has passed.

The target does the work (roundexport/targets/<name>), or, where the folder is one of a format of others, foreign.py;
this module finds the float source, refuses what the target
cannot hold before anything is written, has the outputs compared (output_check.py), and keeps the write atomic.  A model
folder may stand in for an artifact: it is exported as it is, every weight float, which is the baseline the samples
measure against.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from roundexport.environment.disk import check_disk
from roundexport.environment.memory import MemoryLimit
from roundexport.errors import ArtifactError, CheckpointError, UsageError
from roundexport.formats.artifact import Artifact
from roundexport.model.artifact_size import sizes
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.gguf_header import is_gguf
from roundexport.model.parts import part_of
from roundexport.model.torch_threads import torch_threads
from roundexport.model.weight_bytes import WeightBytes
from roundexport.progress import Progress
from roundexport.storage.atomic import write_folder
from roundexport.types import EMBEDS

from .check import check_layers, check_read_files
from .float_artifact import write_float_artifact
from .foreign import export_foreign, foreign_name
from .interface import ExportReport, load_target
from .memory_need import export_moments, writing
from .output_check import check_outputs


@torch_threads()
def export(  # noqa: PLR0913  (the parameters are the verb's flags)
    artifact: str | Path,
    out: str | Path,
    *,
    to: str = "onnx",
    model: str | Path | None = None,
    device: str = "cpu",
    max_context: int | None = None,
    settings: Mapping[str, int | float | str | bool | None] | None = None,
    max_ram: float | None = None,
    progress: bool | Progress = True,
) -> ExportReport:
    """Write an artifact as a package for one runtime, or as a checkpoint in a format of others.

    Args:
        artifact: an artifact folder, or a model folder to export as it is (float).
        out: package folder to make; must not exist.
        to: ``onnx`` or ``openvino``, or a format of others, which has no settings: ``auto_round``, ``gptq``, ``awq``,
            ``compressed-tensors``, ``gguf``.
        model: the float model, where it is no longer at the place that the artifact names.
        device: the device the package is meant for; ``cpu`` or ``gpu``.
        max_context: longest sequence the package serves; if not given the model's own limit, or less where its rotary
            angles change with the length of the text (graph/rotary_length.py); the report says so.
        settings: further settings of the target, by name, as ``{"accuracy_level": 0}`` for ``onnx``.
        max_ram: GiB of memory to stay within.
        progress: report on stderr, or where to report.

    Returns:
        What was exported, kept float, fused and written, and how far its outputs are from the model's.

    Raises:
        UsageError: ``out`` exists, or the target or a setting is unknown.
        ArtifactError: the artifact is damaged, or ``model`` is another model than the one it was tuned from.
        UnsupportedError: the target cannot hold a layer, the model's structure cannot be captured, or the package gives
            other outputs than the model with the artifact's weights.
        WontFitError: it takes more than ``max_ram``, mostly to open the package and compare its outputs.
    """
    limit = MemoryLimit(max_ram)
    asked = {"device": device, "max_context": max_context, **(settings or {})}
    foreign = foreign_name(to)
    if foreign is not None:
        with (
            Progress.of(progress) as shown,
            shown.stage(f"export to {foreign}"),
            _opened(Path(artifact), model, shown, max_ram) as (opened, checkpoint),
        ):
            limit.check("an export", writing(WeightBytes.of(checkpoint)), advice="use a machine with more memory")
            return export_foreign(foreign, opened, checkpoint, Path(out), asked, shown)
    target = load_target(to)
    read = target.read_settings(to, asked)
    with (
        Progress.of(progress) as shown,
        shown.stage(f"export to {to}"),
        _opened(Path(artifact), model, shown, max_ram) as (opened, checkpoint),
    ):
        check_read_files(checkpoint)
        _check_room(opened, checkpoint, limit, bool(asked.get(EMBEDS)))
        size = sizes(opened, checkpoint).total or 0
        parts = {"the package": size, **({"what waits to be written": size} if target.spills else {})}
        shown.say(check_disk(Path(out), "the export", parts, "free some, or write elsewhere"))
        check_layers(target, to, [(opened.entry(name).info, opened.entry(name).spec) for name in opened.names()])
        with write_folder(Path(out)) as folder:
            with shown.stage(f"capturing the model and writing the package for {to}"):
                report = target.export(opened, checkpoint, folder, read)
            with shown.stage("comparing its outputs with the model's") as stage:
                found = check_outputs(folder, opened, checkpoint, limit, stage.doing)
            return replace(report, outputs=found, notes=(*report.notes, *found.notes(report.target)))


def _check_room(artifact: Artifact, checkpoint: Checkpoint, limit: MemoryLimit, embeds: bool) -> None:
    """Refuse an export that takes too much memory."""
    if limit.bytes is None:
        return
    limit.check(
        "an export, whose outputs are compared with the model's,",
        *export_moments(sizes(artifact, checkpoint).total or 0, WeightBytes.of(checkpoint), checkpoint.task, embeds),
        advice="use a machine with more memory, or fewer bits",
    )


@contextmanager
def _opened(
    path: Path, model: str | Path | None, shown: Progress, max_ram: float | None
) -> Iterator[tuple[Artifact, Checkpoint]]:
    if (path / "manifest.json").is_file():
        artifact = Artifact.open(path)
        yield artifact, source_of(artifact, model, shown, max_ram)
    elif (path / "config.json").is_file() or is_gguf(path):
        if model is not None:
            raise UsageError(f"{path} is a model, which is exported as it is; --model goes with an artifact")
        checkpoint = Checkpoint.open(path, progress=shown, max_ram=max_ram)
        if checkpoint.imported is not None:
            raise UsageError(
                f"{path} is a quantized checkpoint; make an artifact of its integers first: roundexport import; or go "
                "all the way: roundexport convert"
            )
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint.identify(shown)
            yield Artifact.open(write_float_artifact(checkpoint, Path(scratch) / "artifact")), checkpoint
    else:
        raise ArtifactError(
            f"{path} is neither an artifact (manifest.json) nor a model folder (config.json); "
            "make an artifact with `roundexport tune`"
        )


def source_of(
    artifact: Artifact,
    model: str | Path | None = None,
    progress: bool | Progress = False,
    max_ram: float | None = None,
) -> Checkpoint:
    """The float model an artifact was tuned from.

    Args:
        artifact: the artifact.
        model: where it is now, if not where the artifact says.
        progress: report on stderr, or where to report, what it takes to open it.
        max_ram: GiB of memory to stay within.

    Raises:
        ArtifactError: what is there is another model.
        CheckpointError: nothing is there.
    """
    source = artifact.manifest.source
    try:
        checkpoint = Checkpoint.open(
            model if model is not None else str(source["location"]),
            progress=progress,
            part=part_of(source["task"]),
            max_ram=max_ram,
        )
    except CheckpointError as error:
        where = "" if model is not None else " (the artifact's note of where its float model was; pass --model)"
        raise CheckpointError(f"{error}{where}") from error
    if checkpoint.identify(Progress.of(progress)) != source["digest"]:
        raise ArtifactError(
            f"{checkpoint.location} is not the model this artifact was tuned from: its weights hash to "
            f"{checkpoint.digest[:12]}, the artifact names {str(source['digest'])[:12]}; pass the right one as --model"
        )
    return checkpoint
