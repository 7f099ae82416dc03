"""The files that a client needs beside the weights: config, tokenizer, chat template, pooling, license.

They are copied byte for byte.  One is not: config.json of a checkpoint that others have quantized says so in
`quantization_config`, by which every client would look for that format's tensors; the copy is without it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from roundexport.errors import CheckpointError
from roundexport.storage.checksums import sha256_file
from roundexport.storage.paths import safe_join
from roundexport.storage.tensor_cache import key_of

from .model_config import CONFIG, GENERATION, QUANTIZATION, config_without_quantization
from .pooling import head_files

_SIDE_FILES = (
    CONFIG, GENERATION, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json", "modules.json", "sentence_bert_config.json",
    "config_sentence_transformers.json", "preprocessor_config.json", "processor_config.json", "normalizer.json",
    "source.spm", "target.spm", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt",
)  # fmt: skip


def side_files(folder: Path) -> list[Path]:
    """Those that a model folder has, relative to it."""
    return [Path(name) for name in (*_SIDE_FILES, *head_files(folder)) if safe_join(folder, name).is_file()]


def side_files_digest(folder: Path) -> str:
    """One sha256 over their names and bytes: tokenizer and chat template decide samples as much as the text does."""
    names = side_files(folder)
    return key_of(files={path.as_posix(): sha256_file(folder / path) for path in names})


def check_side_files(folder: Path, location: str) -> None:
    """Make sure, before any work, that every side file can be copied and the model's place can be written down.

    Raises:
        CheckpointError: a file cannot be read or lies outside the folder, or the path is not UTF-8.
    """
    try:
        location.encode()
        for path in side_files(folder):
            with (folder / path).open("rb"):
                pass
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{location!r} is not UTF-8, so no manifest can name it; rename it") from error


def copy_side_files(folder: Path, out: Path) -> list[str]:
    """Copy them into ``out``, sub-folders kept; returns their names."""
    names = [path.as_posix() for path in side_files(folder)]
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, out / name)
    if QUANTIZATION in (folder / CONFIG).read_text(encoding="utf-8"):
        config = config_without_quantization(folder)
        (out / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return names
