"""Calibration: the token ids that tuning sees, from a text file, a Hugging Face dataset, or the model itself.

    FILE               one stream of text, cut into samples of equal length; the first num_samples are used
    owner/name[:config]  the same from a dataset's training split, records joined by blank lines; the column is the
                       first there is of text, content, document; needs the `datasets` package
    self               nothing to download: a decoder writes its own samples, by ancestral sampling at temperature 1
                       from its beginning-of-sequence token, which draws from the very distribution that has to survive.
                       An encoder cannot write, so its samples are words drawn from its vocabulary with Zipf's law
                       (p ∝ 1/(rank + 2.7), ranks by token id: vocabularies list frequent pieces first)

Every sample is framed as the model's tokenizer frames a text ([CLS] … [SEP], a leading <bos>) where it does.  There is
no padding: a text shorter than one sample is refused.  ``sample_len`` is cut to the positions the model has.

The identity (kind, sha256 of the ids, counts, seed, sha256 of a file's text) goes into the artifact's manifest, so that
a result can be traced and held-out text be told from calibration text.
Source of the Zipf-Mandelbrot constant: Mandelbrot's 2.7 for English words; what it buys is in docs/lab-notes.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import CheckpointError, UsageError
from roundexport.model.positions import max_positions
from roundexport.model.special_tokens import first_token
from roundexport.model.transformers_loading import read_tokenizer

if TYPE_CHECKING:
    import torch

    from roundexport.model.checkpoint import Checkpoint

Ids = NDArray[np.int64]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
_TEXT_COLUMNS = ("text", "content", "document")
_CHARS_PER_TOKEN = 8  # text read at first per token needed; doubled until there is enough
_KV_BYTES = 512 << 20  # keys and values held while a model writes its samples
WRITING_BYTES = 1 << 30  # what that takes beside the weights: keys, values, and what a forward has alive
_ZIPF_SHIFT = 2.7


@dataclass(frozen=True, eq=False)
class Calibration:
    """Token ids, and where they are from.

    Args:
        ids: int64 [samples, length].
        identity: what goes into a manifest: kind, sha256 of the ids, samples, length, seed and more by kind.
        notes: what a user should know, such as fewer samples than asked for.
    """

    ids: Ids
    identity: dict[str, Any]
    notes: tuple[str, ...] = ()


class Encode(Protocol):
    """Text to token ids, with or without the tokenizer's special tokens around them."""

    def __call__(self, text: str, special: bool) -> list[int]: ...  # noqa: D102


def load_calibration(
    checkpoint: Checkpoint,
    source: str,
    *,
    num_samples: int = 128,
    sample_len: int = 512,
    seed: int = 42,
    model: torch.nn.Module | None = None,
) -> Calibration:
    """Get calibration samples.

    Args:
        checkpoint: the model, whose tokenizer is used.
        source: ``self``, a text file, or a Hugging Face dataset id ``owner/name`` or ``owner/name:config``.
        num_samples: samples wanted; fewer are taken where the text ends.
        sample_len: tokens per sample, special tokens included; cut to the model's positions.
        seed: seed of what ``self`` draws.
        model: the loaded model, where the caller has it already; ``self`` loads it otherwise.

    Returns:
        The samples.

    Raises:
        UsageError: no such file, a dataset that cannot be had, or less text than one sample.
    """
    if num_samples < 1 or sample_len < 8:
        raise UsageError(f"calibration needs at least 1 sample of 8 tokens, not {num_samples} of {sample_len}")
    length = min(sample_len, max_positions(checkpoint))
    notes = [] if length == sample_len else [f"samples are cut to the {length} positions of the model"]
    if source == "self":
        ids, identity = _from_model(checkpoint, num_samples, length, seed, model)
    else:
        ids, identity = _from_text(checkpoint, source, num_samples, length)
    if len(ids) < num_samples:
        notes.append(f"{source} holds {len(ids)} samples of {length} tokens; {num_samples} were asked for")
    return Calibration(ids, {**identity, **_identity(ids, seed)}, tuple(notes))


def encoder_of(checkpoint: Checkpoint) -> Encode:
    """The model's tokenizer: tokenizer.json read without transformers where there is one.

    Raises:
        UsageError: no tokenizer that can be read.
    """
    path = checkpoint.folder / "tokenizer.json"
    if path.is_file():
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(path))
        fast.no_truncation()
        fast.no_padding()
        return lambda text, special: fast.encode(text, add_special_tokens=special).ids
    try:
        slow = read_tokenizer(checkpoint.folder, checkpoint.trust_remote_code)
    except CheckpointError as error:
        raise UsageError(f"{checkpoint.location}: its tokenizer cannot be read: {error}") from error
    return lambda text, special: slow(text, add_special_tokens=special, verbose=False)["input_ids"]


def ids_digest(ids: Ids) -> str:
    """The sha256 of token ids as little-endian int64, row by row."""
    return hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes()).hexdigest()


def text_digest(path: Path) -> str:
    """The sha256 of a text file's bytes.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"calibration text {path} cannot be read: {error.strerror}") from error


def _identity(ids: Ids, seed: int) -> dict[str, Any]:
    return {"ids_sha256": ids_digest(ids), "num_samples": len(ids), "sample_len": ids.shape[1], "seed": seed}


def _from_text(checkpoint: Checkpoint, source: str, num_samples: int, length: int) -> tuple[Ids, dict[str, Any]]:
    encode = encoder_of(checkpoint)
    before, after = _frame(encode)
    body = length - len(before) - len(after)
    wanted = num_samples * body
    path = Path(source)
    if path.is_file():
        identity = {"kind": "text", "file": path.name, "text_sha256": text_digest(path)}
        stream = _encode_enough(encode, _read(path), wanted)
    elif _HUB_ID.fullmatch(source):
        identity = {"kind": "dataset", "dataset": source}
        stream = _encode_enough(encode, _dataset_text(source, wanted * _CHARS_PER_TOKEN), wanted)
    else:
        raise UsageError(
            f"calibration {source!r}: there is no such file, and it is no Hugging Face dataset id (owner/name); "
            "give one of these, or self"
        )
    count = min(num_samples, len(stream) // body)
    if count < 1:
        raise UsageError(
            f"calibration {source}: found {len(stream)} tokens, one sample takes {body}; "
            "give more text, a smaller sample_len, or self"
        )
    rows = [[*before, *stream[start : start + body], *after] for start in range(0, count * body, body)]
    return np.array(rows, np.int64), identity


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"calibration text {path} cannot be read as UTF-8: {error}") from error


def _encode_enough(encode: Encode, text: str, wanted: int) -> list[int]:
    """At least ``wanted`` ids of the text, or all there are; no more of it is tokenized than need be."""
    size = wanted * _CHARS_PER_TOKEN
    while True:
        ids = encode(text[:size], False)
        # The cut may fall inside a word: the last few ids of a part may not be those of the whole.
        if size >= len(text) or len(ids) >= wanted + 16:
            return ids
        size *= 2


def _frame(encode: Encode) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and after a text."""
    plain, framed = encode("a", False), encode("a", True)
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return framed[:start], framed[start + len(plain) :]
    return [], []


def _dataset_text(source: str, enough: int) -> str:
    """Text of a dataset's training split, ``enough`` characters of it."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"calibration {source}: install roundexport[datasets] to read Hugging Face datasets"
        ) from error
    name, _, config = source.partition(":")
    try:
        records = datasets.load_dataset(name, config or None, split="train", streaming=True)
        return "\n\n".join(_texts(source, records, enough))
    except (OSError, ValueError, RuntimeError) as error:  # what datasets and its HTTP client raise
        raise UsageError(
            f"calibration {source}: the dataset's training split could not be read: {str(error).splitlines()[0]}; "
            "with no network, give a text file or self"
        ) from error


def _texts(source: str, records: Any, enough: int) -> Iterator[str]:
    total = 0
    for record in islice(records, enough):
        column = next((name for name in _TEXT_COLUMNS if isinstance(record.get(name), str)), None)
        if column is None:
            raise UsageError(
                f"calibration {source}: its records have the columns {', '.join(record)}; "
                f"one of {', '.join(_TEXT_COLUMNS)} is needed"
            )
        yield record[column]
        total += len(record[column])
        if total >= enough:
            return


def _from_model(
    checkpoint: Checkpoint, num_samples: int, length: int, seed: int, model: torch.nn.Module | None
) -> tuple[Ids, dict[str, Any]]:
    if checkpoint.task == "embed":
        ids = _vocabulary_samples(checkpoint, num_samples, length, seed)
        return ids, {"kind": "vocabulary", "source": "token ids drawn with p ~ 1/(rank + 2.7), ranked by id"}
    ids = write_samples(model or checkpoint.load_model(), checkpoint, num_samples, length, seed)
    return ids, {"kind": "self", "source": "sampled from the model at temperature 1"}


def can_write(checkpoint: Checkpoint) -> bool:
    """Whether the model can write samples: a decoder that names a token to begin with."""
    return checkpoint.task == "generate" and first_token(checkpoint.tokens) is not None


def write_samples(model: torch.nn.Module, checkpoint: Checkpoint, num_samples: int, length: int, seed: int) -> Ids:
    """Let a decoder write samples: each token drawn from the model's own distribution, no truncation.

    An end-of-sequence token is a token like any other: what follows is a new text, as in packed training data.

    Args:
        model: causal language model in evaluation mode.
        checkpoint: the same on disk.
        num_samples: rows.
        length: tokens per row, the first one included.
        seed: of the drawing.

    Returns:
        int64 [num_samples, length].

    Raises:
        UsageError: the model names no token to begin with.
    """
    import torch
    from transformers import StaticCache

    first = first_token(checkpoint.tokens)
    if first is None:
        raise UsageError(
            "calibration self: the model's config names no bos or eos token to begin with; give a text file"
        )
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    batch = _kv_batch(checkpoint.config, length)
    rows = []
    for start in range(0, num_samples, batch):
        ids = torch.full((min(batch, num_samples - start), length), first)
        cache = StaticCache(config=model.config, max_cache_len=length)  # half the time of one that grows by copying
        with torch.no_grad():
            for position in range(1, length):
                last = ids[:, position - 1 : position].to(device)
                logits = model(input_ids=last, past_key_values=cache, use_cache=True).logits[:, -1]
                ids[:, position] = draw_tokens(logits.float().cpu(), generator)
        rows.append(ids)
    return torch.cat(rows).numpy()


def draw_tokens(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token per row from softmax(logits [B, V]), by inverting the cumulative distribution; int64 [B]."""
    import torch

    cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
    threshold = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _kv_batch(config: dict[str, Any], length: int) -> int:
    """Samples written at a time: a fixed amount of keys and values, so that no machine draws other ids."""
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 32)
    heads = int(config.get("num_attention_heads") or config.get("n_head") or 32)
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 4096)
    width = int(config.get("num_key_value_heads") or heads) * int(config.get("head_dim") or hidden // heads)
    return max(1, min(128, _KV_BYTES // (layers * 2 * width * 4 * length)))


def _vocabulary_samples(checkpoint: Checkpoint, num_samples: int, length: int, seed: int) -> Ids:
    before, after = _frame(encoder_of(checkpoint))
    ids = _word_ids(checkpoint)
    weights = 1 / (np.arange(len(ids)) + _ZIPF_SHIFT)
    drawn = np.random.default_rng(seed).choice(
        ids, (num_samples, length - len(before) - len(after)), p=weights / weights.sum()
    )
    framed = [np.tile(np.array(part, np.int64), (num_samples, 1)) for part in (before, after)]
    return np.concatenate([framed[0], drawn, framed[1]], axis=1)


def _word_ids(checkpoint: Checkpoint) -> Ids:
    """Ids of ordinary tokens, ascending: neither special nor placeholders such as [unused7]."""
    path = checkpoint.folder / "tokenizer.json"
    if not path.is_file():
        raise UsageError(
            "calibration self: an encoder without tokenizer.json has no vocabulary to draw from; give text"
        )
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    ordinary = (i for i in sorted(vocabulary) if i not in special and not vocabulary[i].startswith("[unused"))
    return np.fromiter(ordinary, np.int64)
