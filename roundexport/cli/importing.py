"""`roundexport import`: the integers of a checkpoint that others have quantized, as an artifact."""

from __future__ import annotations

from pathlib import Path

from roundexport.progress import Progress

from . import printing
from .shared_options import LOADING, Json, MaxRam, Part


def import_checkpoint(
    checkpoint: str, out: Path, part: Part = None, max_ram: MaxRam = None, json: Json = False
) -> None:
    """Take the integers of a checkpoint that others quantized (GPTQ, AWQ, GGUF, ...); writes an artifact."""
    with Progress() as shown:
        with shown.stage(LOADING):
            from roundexport.conversion.importing import import_checkpoint as run
            from roundexport.formats.artifact import Artifact
        folder = run(checkpoint, out, part=part, max_ram=max_ram, progress=shown)
    artifact = Artifact.open(folder, check_hashes=False)
    if json:
        printing.document(
            {
                "artifact": str(folder),
                "bits_per_weight": artifact.bits_per_weight,
                "layers": len(artifact.names()),
                "kept_float": len(artifact.manifest.kept_float),
            }
        )
    else:
        printing.line(
            f"{folder}: {len(artifact.names())} layers as they were, {artifact.bits_per_weight:.3f} bits per weight; "
            f"{len(artifact.manifest.kept_float)} stay float"
        )
