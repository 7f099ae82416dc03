"""A GGUF file as a model folder: dequantized once by transformers' own reader and kept in the user's cache.

    <cache>/gguf/<sha256 of the file>-<number of this code>/   config.json, model.safetensors, tokenizer, chat template

Each tensor is stored in the narrowest of float16, bfloat16 and float32 that holds the reader's float32 values bit for
bit: F16 files stay float16; a value of Q4_1, f16 scale × integer + f16 minimum, needs float32.  The model's identity is
the hash of the GGUF file, so it outlives the cache and other releases of transformers.

The reader sees the file alone, through a link in a folder of its own: nothing that lies beside it is read, and no code
is run.  What the reader cannot do is refused before it starts (gguf_check.py).
Limits: the whole model is in memory once, as float32 and as the reader's own copy; weights that were rounded when the
file was made stay rounded, which flatters every scheme whose grid is like the file's.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roundexport.environment.control_groups import memory_free
from roundexport.environment.memory import MemoryLimit
from roundexport.errors import CheckpointError, UnsupportedError, WontFitError
from roundexport.progress import Progress
from roundexport.storage.checksums import hash_files
from roundexport.storage.user_cache import cached_folder

from .gguf_check import DIGIT_BY_DIGIT, check_config, check_data, check_elements, check_kind
from .gguf_header import GgufHeader, read_header
from .transformers_loading import build_model, read_config, read_gguf_model, read_tokenizer

if TYPE_CHECKING:
    import torch

_VERSION = 1  # of what this code writes; a new number makes new cache entries and new identities
_NAME = "model.gguf"
_ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
_NOT_OF_THE_MODEL = ("quantization_config", "transformers_version", "_name_or_path", "_model_name_or_path")


def open_gguf(
    path: Path, progress: bool | Progress = False, max_ram: float | None = None
) -> tuple[Path, dict[str, str]]:
    """The folder of a GGUF file's model, and its identity.

    Args:
        path: the file.
        progress: report on stderr, or where to report; only what takes long is.
        max_ram: GiB of memory to stay within.

    Returns:
        A Hugging Face folder in the user's cache, and sha256 by name as `Checkpoint.files` gives it.

    Raises:
        CheckpointError: not a GGUF file, damaged, or the packages that read it are not installed.
        UnsupportedError: something in it that the reader cannot do.
        WontFitError: not enough memory or disk.
    """
    header = read_header(path)
    with Progress.of(progress) as shown:
        (digest,) = hash_files([path], f"{path.name}: hashing", shown)
        folder = cached_folder(
            "gguf", f"{digest}-{_VERSION}", functools.partial(_write, header, shown, MemoryLimit(max_ram))
        )
    return folder, {f"{_NAME}, read by {_VERSION}": digest}


def _write(header: GgufHeader, shown: Progress, limit: MemoryLimit, folder: Path) -> None:
    """Dequantize a file into an empty folder, after everything that its header can tell."""
    missing = [name for name in ("gguf", "accelerate", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(
            f"{header.path}: to read GGUF files, install {' and '.join(missing)}: pip install 'roundexport[tune,gguf]'"
        )
    name, weights = header.path.name, sum(prod(tensor.shape) for tensor in header.tensors)
    with shown.stage(f"{name}: checking what its header says"):
        check_kind(header)
        check_data(header)
        _check_memory(header, weights, limit)
    shown.say(
        f"{name}: {header.architecture}, {weights / 1e6:.0f} million weights, is dequantized to float once and kept in "
        "the cache"
    )
    with tempfile.TemporaryDirectory() as alone, _reader_errors(header.path):
        os.symlink(header.path.resolve(), Path(alone) / _NAME)
        with shown.stage(f"{name}: dequantizing") as stage:
            model = _read_model(header, Path(alone), stage.at)
        with shown.stage(f"{name}: writing the float weights"):
            _write_weights(model, folder)
            _write_configs(header, model, folder)
        with shown.stage(f"{name}: reading its tokenizer"):
            _write_tokenizer(header, Path(alone), model.config, folder)


def _read_model(header: GgufHeader, alone: Path, report: Callable[[float, str], None]) -> Any:
    import torch

    report(0.0, "reading its configuration")
    config = read_config(alone, trust_remote_code=False, gguf_file=_NAME)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{header.path}: {config.model_type} has an encoder and a decoder, which is not supported"
        )
    check_config(header, config)
    with torch.device("meta"):
        check_elements(header, build_model(alone, config, trust_remote_code=False, task="generate", attention=None))
    report(0.0, "opening its tensors")
    with _quiet():
        model, loading = read_gguf_model(alone, _NAME, report)
    odd = sorted({*loading["missing_keys"], *loading["mismatched_keys"], *loading["unexpected_keys"]})
    if odd:
        raise CheckpointError(f"{header.path}: transformers' GGUF reader leaves {len(odd)} tensors out, as {odd[0]}")
    return model


def _write_weights(model: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    # parameters() gives a tied weight once, under the embedding's name
    tensors = {name: _narrowest(parameter.detach()) for name, parameter in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _narrowest(values: torch.Tensor) -> torch.Tensor:
    """The float32 values in the smallest dtype that holds each of them exactly."""
    import torch

    for dtype in (torch.float16, torch.bfloat16):
        narrow = values.to(dtype)
        if torch.equal(narrow.float(), values):
            return narrow.contiguous()
    return values.contiguous()


def _write_configs(header: GgufHeader, model: Any, folder: Path) -> None:
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_OF_THE_MODEL}
    config |= {"architectures": [type(model).__name__], "dtype": "float32"}
    stated = model.generation_config.to_diff_dict()
    generation = {name: stated[name] for name in stated if not name.startswith("_") and name not in _NOT_OF_THE_MODEL}
    ends = dict.fromkeys(header.metadata[key] for key in _ENDS if key in header.metadata)
    if len(ends) > 1:  # a chat model ends its turn by another token than a text
        generation["eos_token_id"] = list(ends)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_tokenizer(header: GgufHeader, alone: Path, config: Any, folder: Path) -> None:
    from tokenizers import pre_tokenizers

    tokenizer = read_tokenizer(alone, trust_remote_code=False, gguf_file=_NAME)
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    if header.metadata.get("tokenizer.ggml.pre") in DIGIT_BY_DIGIT:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    for name in ("is_local", "local_files_only"):  # of the loading, not of the tokenizer
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(folder)


def _check_memory(header: GgufHeader, weights: int, limit: MemoryLimit) -> None:
    need, free, instead = 8 * weights, memory_free(), "give the folder of the float model"
    limit.check(f"{header.path}, dequantized once,", {"its weights as float32, twice": need}, advice=instead)
    if need > free:
        raise WontFitError(
            f"{header.path}: to dequantize its {weights:,} weights takes {need / 2**30:.1f} GiB of memory, "
            f"{free / 2**30:.1f} GiB are free; free some, or {instead}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the reader's own progress bars, which it does not let be turned off; progress.py shows ours."""
    with redirect_stderr(io.StringIO()):
        yield


@contextmanager
def _reader_errors(path: Path) -> Iterator[None]:
    """What the reader raises, as an error about the file."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, LookupError, NotImplementedError, AttributeError) as error:
        raise CheckpointError(f"{path}: transformers' GGUF reader failed: {type(error).__name__}: {error}") from error
