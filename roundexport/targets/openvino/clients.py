"""What a client needs beside the graph: tokenizer, its OpenVINO form, templates, generation settings, token ids.

Files of the source are copied byte for byte.  `openvino_tokenizer.xml` and `openvino_detokenizer.xml` are what
openvino_genai tokenizes with, made from tokenizer.json where there is one, as that is what the runtime reads; where the
conversion does not know a tokenizer the package still serves clients that read tokenizer.json, and the report says why.
genai stops at what generation_config.json names, so ids that only the model's config names are added there.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roundexport.errors import CheckpointError
from roundexport.formats.package import Tokens
from roundexport.model.model_config import GENERATION
from roundexport.model.transformers_loading import read_tokenizer
from roundexport.types import WITHOUT_TOKENS

from .saving import save
from .stable_names import stable_names

if TYPE_CHECKING:
    from roundexport.model.checkpoint import Checkpoint


def write_client_files(checkpoint: Checkpoint, folder: Path) -> list[tuple[str, str]]:
    """Write all client files; returns (file, reason) of those that could not be made."""
    checkpoint.copy_side_files(folder)
    if checkpoint.task == "generate":
        _complete_generation_config(checkpoint.tokens, folder / GENERATION)
    reason = None if checkpoint.task in WITHOUT_TOKENS else _write_tokenizer(checkpoint, folder)
    return [("openvino_tokenizer", reason)] if reason else []


def _complete_generation_config(special: Tokens, path: Path) -> None:
    """Name every special token in generation_config.json; a file that names them all already stays as it is."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ids = {"bos": special["bos"], "eos": list(special["eos"]), "pad": special["pad"]}
    if len(special["eos"]) == 1:
        ids["eos"] = special["eos"][0]
    lacking = {
        f"{kind}_token_id": value
        for kind, value in ids.items()
        if value not in (None, []) and found.get(f"{kind}_token_id") is None
    }
    if lacking or not path.is_file():
        path.write_text(json.dumps({**found, **lacking}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_tokenizer(checkpoint: Checkpoint, folder: Path) -> str | None:
    """Convert the tokenizer; returns why not where that fails."""
    from openvino_tokenizers import convert_tokenizer
    from tokenizers import Tokenizer

    if not any((checkpoint.folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.txt")):
        return "the model folder has no tokenizer"
    with warnings.catch_warnings():
        # Raised inside transformers and openvino_tokenizers about their own files and regular expressions.
        warnings.simplefilter("ignore")
        try:
            tokenizer = read_tokenizer(checkpoint.folder, checkpoint.trust_remote_code)
            if (file := checkpoint.folder / "tokenizer.json").is_file():
                # transformers builds some classes from vocab.json and merges.txt instead, or takes the post-processor
                # apart; calibration and the runtime read this file, and so does the converted tokenizer.
                tokenizer._tokenizer = Tokenizer.from_file(str(file))
            pair = convert_tokenizer(tokenizer, with_detokenizer=True)
        except CheckpointError as error:
            return str(error).splitlines()[0][:300]
        except Exception as error:  # third-party converters raise whatever they please; the package stands without
            return f"openvino_tokenizers cannot convert it: {type(error).__name__}: {str(error).splitlines()[0]:.200}"
    for model, name in zip(pair, ("openvino_tokenizer", "openvino_detokenizer"), strict=True):
        stable_names(model, name)
        save(model, folder / f"{name}.xml")
    return None
