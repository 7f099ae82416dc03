"""What an artifact says of the float model it was tuned from."""

from __future__ import annotations

from roundexport.formats.artifact_manifest import Source

from .checkpoint import Checkpoint


def artifact_source(checkpoint: Checkpoint) -> Source:
    """What an artifact says of the float model it was tuned from."""
    return {
        "location": checkpoint.location,
        "model_type": checkpoint.model_type,
        "task": checkpoint.task,
        "digest": checkpoint.digest,
        "files": checkpoint.files(),
    }
