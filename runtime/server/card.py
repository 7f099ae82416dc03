"""A package's card: what it is, how it was made, what it lost and what runs it, for the page and for programs.

The figures of its accuracy are those that `verify` keeps in the package (verification.json).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roundexport.formats.verification_record import read_record
from roundexport.runtime.embedding import Encoder
from roundexport.runtime.generation import Decoder
from roundexport.runtime.text_package import TextPackage
from roundexport.runtime.tool_calls import format_of
from roundexport.runtime.transcription import Transcriber


def card(folder: Path, package: Decoder | TextPackage | Transcriber, defaults: Mapping[str, float]) -> dict[str, Any]:
    """The card as JSON; paths of this machine are left out.

    Args:
        folder: the package's.
        package: the opened package.
        defaults: how it is sampled where a request does not say.
    """
    manifest = package.manifest
    source = package.tokenizer.template_source(tools=True)
    notation = None if source is None else format_of(source)
    return {
        "task": manifest.task,
        "target": manifest.target,
        "model_type": manifest.model_type,
        "source": Path(manifest.source["location"]).name,
        "calibration": {k: v for k, v in manifest.source["calibration"].items() if not isinstance(v, dict | list)},
        "max_context": package.max_length if isinstance(package, TextPackage) else manifest.max_context,
        "vocab_size": manifest.vocab_size,
        "hidden_size": manifest.hidden_size,
        "pooling": manifest.pooling,
        "prompts": package.prompts.texts if isinstance(package, Encoder) else {},
        "bytes": sum(entry["size"] for entry in manifest.files.values()),
        "files": {name: entry["size"] for name, entry in manifest.files.items()},
        "layers": [
            {"name": name, "bits": layer["bits"], "group_size": layer["group_size"], "stored": layer["stored"]}
            for name, layer in manifest.layers.items()
        ],
        "kept_float": [{"name": name, "why": why} for name, why in manifest.kept_float],
        "fusions": manifest.fusions,
        "versions": manifest.versions,
        "settings": manifest.settings,
        "quality": quality(folder),
        "engine": package.info(),
        "defaults": dict(defaults),
        "chat": package.tokenizer.has_chat_template,
        "tools": None if notation is None else notation.name,
    }


def quality(folder: Path) -> dict[str, Any] | None:
    """What verification found, the text's name and gates that failed; None where there is no record."""
    record = read_record(folder)
    if record is None or not isinstance(record.get("quality"), dict):
        return None
    return {"text": Path(str(record.get("text"))).name, "failures": record.get("failures"), **record["quality"]}
