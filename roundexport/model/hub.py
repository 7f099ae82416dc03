"""From what a person calls a model to a folder on this machine: a path, or a Hugging Face hub id that is fetched once.

A URL of an object store is fetched too (fetched_folder.py).
Without a network an id that was fetched before is found in the hub's cache.  Pickle weights are never fetched.
"""

from __future__ import annotations

import re
from pathlib import Path

from roundexport.errors import CheckpointError
from roundexport.progress import Progress

from .fetched_folder import fetch, is_url

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Endings of weight files that can run code when they are read."""

_FETCHED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*", "README.md"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(model: str | Path, trust_remote_code: bool, progress: bool | Progress = False) -> Path:
    """The folder of a model.

    Args:
        model: folder, ``owner/name``, or the URL of a folder in an object store.
        trust_remote_code: fetch the Python files of an id, too.
        progress: report on stderr, or where to report, while an id is fetched.

    Raises:
        CheckpointError: no such folder, or an id that cannot be fetched.
    """
    code = ["*.py"] if trust_remote_code else []
    if is_url(model):
        return fetch(str(model), [*_FETCHED, *code], progress)
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        kind = "a pickle file, which is never read" if folder.suffix in PICKLES else "a file"
        raise CheckpointError(
            f"{model} is {kind}; give the model's folder, with config.json and safetensors weights, or a GGUF file"
        )
    if folder.suffix == ".gguf" or not _HUB_ID.fullmatch(str(model)):
        raise CheckpointError(f"{model}: there is no such folder, and it is no Hugging Face id of the form owner/name")
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(f"{model}: no such folder; to fetch it, install roundexport[tune]") from error
    try:
        with Progress.of(progress) as shown, shown.stage(f"fetching {model} from the Hugging Face hub"):
            return Path(huggingface_hub.snapshot_download(str(model), allow_patterns=[*_FETCHED, *code]))
    except (OSError, ValueError, RuntimeError) as error:  # what huggingface_hub and its HTTP client raise
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{model}: there is no such folder, and it could not be fetched from the Hugging Face hub: {reason}"
        ) from error
