"""An artifact that quantizes nothing: from it targets make the float package that others are compared with."""

from __future__ import annotations

from pathlib import Path

from roundexport.environment.versions import library_versions
from roundexport.formats.artifact_writer import ArtifactWriter
from roundexport.model.artifact_source import artifact_source
from roundexport.model.checkpoint import Checkpoint
from roundexport.storage.atomic import write_folder


def write_float_artifact(checkpoint: Checkpoint, out: str | Path) -> Path:
    """Write an artifact that quantizes nothing, from which targets make the float package they are compared with.

    Args:
        checkpoint: the float model.
        out: artifact folder to make.

    Returns:
        The artifact folder.

    Raises:
        UsageError: ``out`` exists.
        CheckpointError: the model cannot be read.
    """
    weights = [name for name in checkpoint.names() if name.endswith(".weight") and len(checkpoint.shape(name)) > 1]
    with write_folder(Path(out)) as folder:
        ArtifactWriter(folder, []).finish(
            source=artifact_source(checkpoint),
            algorithm={"name": "float", "settings": {}},
            calibration={"kind": "none"},
            kept_float=[(name.removesuffix(".weight"), "nothing is quantized") for name in weights],
            versions=library_versions(),
            side_files=checkpoint.copy_side_files(folder),
        )
    return Path(out)
