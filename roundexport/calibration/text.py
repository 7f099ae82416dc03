"""Text to token ids: the model's own tokenizer, its framing of a text, and a stream cut into samples of one length.

    text ─ tokenized as one stream, without special tokens ─ cut every ``body`` tokens ─ framed ([CLS] … [SEP], <bos> …)

Of a long text no more is tokenized than is needed.  There is no padding: what is left at the end is dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import CheckpointError, UsageError
from roundexport.model.transformers_loading import read_tokenizer

if TYPE_CHECKING:
    from roundexport.model.checkpoint import Checkpoint

Ids = NDArray[np.int64]

CHARS_PER_TOKEN = 8
"""Text read at first per token needed; doubled until there is enough."""


class Encode(Protocol):
    """Text to token ids, with or without the tokenizer's special tokens around them."""

    def __call__(self, text: str, special: bool) -> list[int]: ...  # noqa: D102


def encoder_of(checkpoint: Checkpoint) -> Encode:
    """The model's tokenizer: tokenizer.json read without transformers where there is one.

    Raises:
        UsageError: no tokenizer that can be read.
    """
    path = checkpoint.folder / "tokenizer.json"
    if path.is_file():
        from tokenizers import Tokenizer

        try:
            fast = Tokenizer.from_file(str(path))
        except Exception as error:  # it raises nothing narrower
            raise UsageError(f"{checkpoint.location}: its tokenizer cannot be read: {error}") from error
        fast.no_truncation()
        fast.no_padding()
        return lambda text, special: fast.encode(text, add_special_tokens=special).ids
    try:
        slow = read_tokenizer(checkpoint.folder, checkpoint.trust_remote_code)
    except CheckpointError as error:
        raise UsageError(f"{checkpoint.location}: its tokenizer cannot be read: {error}") from error
    return lambda text, special: slow(text, add_special_tokens=special, verbose=False)["input_ids"]


def cut_samples(encode: Encode, text: Callable[[int], str], source: str, num_samples: int, length: int) -> Ids:
    """Samples of one stream of text.

    Args:
        encode: the model's tokenizer.
        text: the text, of which at least so many characters are wanted.
        source: what it is, for the refusal.
        num_samples: samples wanted; fewer are taken where the text ends.
        length: tokens per sample, special tokens included.

    Returns:
        int64 [samples, length].

    Raises:
        UsageError: the text is shorter than one sample, or a sample has no room for text.
    """
    before, after = frame(encode)
    body = length - len(before) - len(after)
    if num_samples < 1 or body < 1:
        raise UsageError(
            f"{source}: asked for {num_samples} samples of {length} tokens, {length - body} of which are the "
            "tokenizer's own; give a larger num_samples or sample_len"
        )
    wanted = num_samples * body
    stream = encode_enough(encode, text(wanted * CHARS_PER_TOKEN), wanted)
    count = min(num_samples, len(stream) // body)
    if count < 1:
        raise UsageError(
            f"{source}: found {len(stream)} tokens, one sample takes {body}; give more text or a smaller sample_len"
        )
    rows = [[*before, *stream[start : start + body], *after] for start in range(0, count * body, body)]
    return np.array(rows, np.int64)


def encode_enough(encode: Encode, text: str, wanted: int) -> list[int]:
    """At least ``wanted`` ids of the text, or all there are; no more of it is tokenized than need be."""
    size = wanted * CHARS_PER_TOKEN
    while True:
        ids = encode(text[:size], False)
        # The cut may fall inside a word: the last few ids of a part may not be those of the whole.
        if size >= len(text) or len(ids) >= wanted + 16:
            return ids
        size *= 2


def frame(encode: Encode) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and after a text."""
    plain, framed = encode("a", False), encode("a", True)
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return framed[:start], framed[start + len(plain) :]
    return [], []


def text_digest(path: Path) -> str:
    """The sha256 of a text file's bytes.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"calibration text {path} cannot be read: {error.strerror}") from error


def read_text(path: Path) -> str:
    """A text file; a byte order mark at its beginning is no part of the text.

    Raises:
        UsageError: it cannot be read as UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"calibration text {path} cannot be read as UTF-8: {error}") from error
