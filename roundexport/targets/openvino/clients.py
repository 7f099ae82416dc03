"""What a client needs beside the graph: tokenizer, its OpenVINO form, templates, generation settings, token ids.

Files of the source are copied byte for byte.  `openvino_tokenizer.xml` and `openvino_detokenizer.xml` are what
openvino_genai tokenizes with; where the conversion does not know a tokenizer the package still serves clients that read
tokenizer.json, and the report says why.  genai stops at what generation_config.json names, so one is written from the
model's config where the source has none.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roundexport.formats.package import Tokens

from .saving import save
from .stable_names import stable_names

if TYPE_CHECKING:
    from roundexport.model.checkpoint import Checkpoint

_GENERATION = "generation_config.json"


def write_client_files(checkpoint: Checkpoint, folder: Path) -> list[tuple[str, str]]:
    """Write all client files; returns (file, reason) of those that could not be made."""
    checkpoint.copy_side_files(folder)
    if checkpoint.task == "generate" and not (folder / _GENERATION).exists():
        ids = {f"{kind}_token_id": checkpoint.config.get(f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        known = {key: value for key, value in ids.items() if value is not None}
        (folder / _GENERATION).write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    reason = _write_tokenizer(checkpoint, folder)
    return [("openvino_tokenizer", reason)] if reason else []


def token_ids(checkpoint: Checkpoint) -> Tokens:
    """Special token ids: generation_config.json before config.json, as transformers has it."""
    path = checkpoint.folder / _GENERATION
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def value(kind: str) -> Any:
        name = f"{kind}_token_id"
        found = generation.get(name)
        return checkpoint.config.get(name) if found is None else found

    eos = value("eos")
    stops = () if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),)
    return {"bos": _single(value("bos")), "eos": stops, "pad": _single(value("pad"))}


def _single(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _write_tokenizer(checkpoint: Checkpoint, folder: Path) -> str | None:
    """Convert the tokenizer; returns why not where that fails."""
    import transformers
    from openvino_tokenizers import convert_tokenizer

    if not any((checkpoint.folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.txt")):
        return "the model folder has no tokenizer"
    with warnings.catch_warnings():
        # Raised inside transformers and openvino_tokenizers about their own files and regular expressions.
        warnings.simplefilter("ignore")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True)
            pair = convert_tokenizer(tokenizer, with_detokenizer=True)
        except Exception as error:  # third-party converters raise whatever they please; the package stands without
            return f"openvino_tokenizers cannot convert it: {type(error).__name__}: {str(error).splitlines()[0]:.200}"
    for model, name in zip(pair, ("openvino_tokenizer", "openvino_detokenizer"), strict=True):
        stable_names(model, name)
        save(model, folder / f"{name}.xml")
    return None
