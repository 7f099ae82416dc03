"""What the files of sentence-transformers say of a model folder: whether it embeds, and how its vectors are made.

    config_sentence_transformers.json     `model_type` CrossEncoder: scores of pairs, not vectors
    modules.json                          the modules behind the model, see formats/embedding_head.py

What is wrong with these files is wrong with the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from roundexport.errors import ArtifactError, CheckpointError
from roundexport.formats.embedding_head import MODULES, EmbeddingHead, module_files, read_head
from roundexport.storage.paths import ListedFiles, safe_join
from roundexport.storage.strict_json import parse
from roundexport.types import Pooling

SETTINGS = "config_sentence_transformers.json"
_IN_FRONT = ("cls_token", "class_embedding")  # a position of its own in front of an image's patches


def embeds(folder: Path) -> bool:
    """Whether sentence-transformers would make vectors with a folder, and not scores of pairs (its cross-encoders).

    Raises:
        CheckpointError: the file that says so is damaged.
    """
    path = safe_join(folder, SETTINGS)
    try:
        kind = parse(path.read_bytes(), str(path)).get("model_type") if path.is_file() else None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ArtifactError as error:
        raise CheckpointError(str(error)) from error
    return (folder / MODULES).is_file() and kind != "CrossEncoder"


def embedding_head(folder: Path, hidden_size: int | None = None) -> EmbeddingHead:
    """How vectors are made of hidden states.

    Args:
        folder: the model folder.
        hidden_size: width of the hidden states, held against the modules' own; None: not held.

    Raises:
        CheckpointError: the files are damaged.
        UnsupportedError: a pooling, or a further module, that packages cannot reproduce.
    """
    try:
        return read_head(ListedFiles(folder), hidden_size)
    except OSError as error:
        raise CheckpointError(f"{folder}: a module's file cannot be read: {error.strerror}") from error
    except ArtifactError as error:
        raise CheckpointError(str(error)) from error


def head_files(folder: Path) -> list[str]:
    """Names of the files that the modules behind the model are read from.

    Raises:
        CheckpointError: modules.json is damaged.
    """
    try:
        return list(module_files(ListedFiles(folder)))
    except OSError as error:
        raise CheckpointError(f"{folder / MODULES} cannot be read: {error.strerror}") from error
    except ArtifactError as error:
        raise CheckpointError(str(error)) from error


def image_pooling(names: Iterable[str]) -> Pooling:
    """How hidden states of an image become a vector, by the names of a model's tensors."""
    return {"mode": "cls" if any(name.endswith(_IN_FRONT) for name in names) else "mean", "normalize": False}
