"""How an encoder's hidden states become one vector, from the files of sentence-transformers.

    modules.json              the modules in order: Transformer, Pooling, Normalize; anything else is refused by name
    <Pooling>/config.json     the way of pooling; any of sentence-transformers' own, but not several side by side

A folder without these files is pooled by the mean and not normalized.
Source: `sentence_transformers.models.Pooling`, whose flags and newer single key both occur.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from roundexport.errors import ArtifactError, CheckpointError, UnsupportedError
from roundexport.storage.paths import safe_join
from roundexport.storage.strict_json import parse
from roundexport.types import Pooling, PoolingMode

MODULES, SETTINGS = "modules.json", "config_sentence_transformers.json"
_KNOWN: dict[str, PoolingMode] = {
    "mean_tokens": "mean",
    "cls_token": "cls",
    "lasttoken": "last",
    "max_tokens": "max",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean_tokens": "weightedmean",
}

_IN_FRONT = ("cls_token", "class_embedding")  # a position of its own in front of an image's patches


def embeds(folder: Path) -> bool:
    """Whether sentence-transformers would make vectors with a folder, and not scores of pairs (its cross-encoders).

    Raises:
        CheckpointError: the file that says so is damaged.
    """
    path = safe_join(folder, SETTINGS)
    kind = _read(path, lambda data: parse(data, str(path))).get("model_type") if path.is_file() else None
    return (folder / MODULES).is_file() and kind != "CrossEncoder"


def modules_of(folder: Path) -> list[dict[str, str]]:
    """Entries of modules.json (type, path); none where this is not a sentence-transformers folder.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = safe_join(folder, MODULES)
    if not path.is_file():
        return []
    modules = _read(path, lambda data: parse(b'{"modules":' + data + b"}", str(path)))["modules"]
    try:
        return [{"type": str(module["type"]), "path": str(module["path"])} for module in modules]
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: every module needs a type and a path") from error


def read_pooling(folder: Path, hidden_size: int | None = None) -> Pooling:
    """How to pool.

    Args:
        folder: the model folder.
        hidden_size: width of the hidden states, held against the pooling's own; None: not held.

    Raises:
        CheckpointError: the files are damaged.
        UnsupportedError: a pooling, or a further module, that packages cannot reproduce.
    """
    pooling: Pooling = {"mode": "mean", "normalize": False}
    seen: list[str] = []
    for module in modules_of(folder):
        kind = module["type"].rsplit(".", 1)[-1]
        if "cross_encoder" in module["type"] or kind not in ("Transformer", "Pooling", "Normalize"):
            raise UnsupportedError(f"{folder}: the sentence-transformers module {kind} is not supported")
        if kind == "Pooling":
            path = safe_join(folder, f"{module['path']}/config.json")
            pooling["mode"] = _mode(_read(path, lambda data, path=path: parse(data, str(path))), path, hidden_size)  # type: ignore[misc]
        pooling["normalize"] = pooling["normalize"] or kind == "Normalize"
        seen.append(kind)
    if seen != ["Transformer", "Pooling", "Normalize"][: len(seen)]:
        raise UnsupportedError(
            f"{folder}: the sentence-transformers modules {', '.join(seen)} are not supported; "
            "Transformer, Pooling and, if wanted, Normalize are, in this order"
        )
    return pooling


def image_pooling(names: Iterable[str]) -> Pooling:
    """How hidden states of an image become a vector, by the names of a model's tensors."""
    return {"mode": "cls" if any(name.endswith(_IN_FRONT) for name in names) else "mean", "normalize": False}


def _mode(config: dict[str, Any], path: Path, hidden_size: int | None) -> PoolingMode:
    flags = [key.removeprefix("pooling_mode_") for key, value in config.items() if value and "pooling_mode_" in key]
    told = config.get("pooling_mode")
    named = [str(name) for name in (told if isinstance(told, list) else [told])] if told is not None else flags
    wanted = [_KNOWN.get(name, name) for name in named]
    width = config.get("word_embedding_dimension", config.get("embedding_dimension"))
    if hidden_size is not None and width is not None and width != hidden_size:
        raise CheckpointError(f"{path}: it pools vectors of {width!r:.40}, the model gives {hidden_size}")
    if config.get("include_prompt") is False:
        raise UnsupportedError(f"{path}: pooling without the prompt (include_prompt false) is not supported")
    for mode in _KNOWN.values():
        if wanted == [mode]:
            return mode
    found = " and ".join(wanted) or "nothing"
    raise UnsupportedError(f"{path}: pooling by {found} is not supported; one of {', '.join(_KNOWN.values())} is")


def _read(path: Path, parsed: Callable[[bytes], dict[str, Any]]) -> dict[str, Any]:
    try:
        return parsed(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ArtifactError as error:
        raise CheckpointError(str(error)) from error
