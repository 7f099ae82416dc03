"""A package's card: what it is, how it was made, what it lost and what runs it, for the page and for programs.

The figures of its accuracy are those that `convert` wrote into ``quality.json`` beside the package; where that file is
absent, or about another package, the card has none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roundexport.formats.package import PackageManifest
from roundexport.runtime.embedding import Encoder
from roundexport.runtime.generation import Decoder

_QUALITY = "quality.json"
_LONGEST = 4 * 2**20


def card(folder: Path, package: Decoder | Encoder, defaults: Mapping[str, float]) -> dict[str, Any]:
    """The card as JSON; paths of this machine are left out.

    Args:
        folder: the package's.
        package: the opened package.
        defaults: how it is sampled where a request does not say.
    """
    manifest = package.manifest
    return {
        "task": manifest.task,
        "target": manifest.target,
        "model_type": manifest.model_type,
        "source": Path(manifest.source["location"]).name,
        "calibration": {k: v for k, v in manifest.source["calibration"].items() if not isinstance(v, dict | list)},
        "max_context": package.max_length if isinstance(package, Encoder) else manifest.max_context,
        "vocab_size": manifest.vocab_size,
        "hidden_size": manifest.hidden_size,
        "pooling": manifest.pooling,
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
        "quality": quality(folder, manifest),
        "engine": package.info(),
        "defaults": dict(defaults),
        "chat": package.tokenizer.has_chat_template,
    }


def quality(folder: Path, manifest: PackageManifest) -> dict[str, Any] | None:
    """What verification found: ``quality`` of the package's entry in quality.json; None where there is none."""
    path = folder.resolve().parent / _QUALITY
    try:
        if path.stat().st_size > _LONGEST:
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        packages, record = found["packages"], found["quality"][manifest.target]
        if Path(packages[manifest.target]).name != folder.resolve().name:
            return None
        return {"text": Path(str(record["text"])).name, "failures": record["failures"], **record["quality"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
