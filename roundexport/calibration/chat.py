"""Conversations as a chat model reads them: through its own template, every sample from the beginning of one.

    messages ─ chat template ─ tokenized without special tokens, which the template writes ─ packed
    sample:  [conversation | conversation | conversation, as much of it as fits]

A sample begins as a prompt does, with what the template puts first; what does not fit into it is dropped.  So turns far
down a long conversation are seen only by long samples.  A model without a template reads the messages as plain text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import RoundexportError, UsageError
from roundexport.model.transformers_loading import read_tokenizer, refusals

from .records import Conversation
from .text import Encode, encoder_of

if TYPE_CHECKING:
    from roundexport.model.checkpoint import Checkpoint

Ids = NDArray[np.int64]
_WORD = "roundexport"  # stands for what a user says


class Template:
    """A model's chat template.

    Args:
        source: its text.
        render: a conversation as text.
    """

    def __init__(self, source: str, render: Callable[[Conversation], str]) -> None:
        self.digest = hashlib.sha256(source.encode()).hexdigest()
        self._render = render

    def texts(self, conversations: Iterable[Conversation], called: str) -> Iterable[str]:
        """Conversations as text, special tokens included.

        Raises:
            UsageError: the template refuses one.
        """
        for number, messages in enumerate(conversations, 1):
            try:
                yield self._render(messages)
            except RoundexportError as error:
                raise UsageError(f"{called}: record {number}: {error}") from error


def template_of(checkpoint: Checkpoint) -> Template | None:
    """The model's chat template; None where it has none."""
    folder = checkpoint.folder
    if (folder / "tokenizer.json").is_file():
        from roundexport.runtime.tokenizer import Tokenizer  # renders as transformers does, within limits

        tokenizer = Tokenizer(folder)
        source = tokenizer.template_source()
        return None if source is None else Template(
            source, lambda messages: tokenizer.chat_prompt(messages, add_generation_prompt=False)
        )  # fmt: skip
    slow: Any = read_tokenizer(folder, checkpoint.trust_remote_code)
    if not slow.chat_template:
        return None

    def render(messages: Conversation) -> str:
        with refusals(folder, "its chat template with these messages"):
            return str(slow.apply_chat_template(messages, tokenize=False))

    return Template(str(slow.chat_template), render)


def user_turn(checkpoint: Checkpoint) -> list[int]:
    """What a chat model's template puts before a user's first word, as tokens; nothing where that cannot be told.

    A system's message that is the template's own is part of it.
    """
    try:
        template = template_of(checkpoint)
        if template is None:
            return []
        (text,) = template.texts([[{"role": "user", "content": _WORD}]], "a user's turn")
        head, found, _ = text.partition(_WORD)
        # A space before a word is part of the word's token, which is the model's to draw.
        return list(encoder_of(checkpoint)(head.rstrip(" "), False)) if found else []
    except RoundexportError:  # a template that wants more than a message, a tokenizer that cannot be read
        return []


def plain_text(messages: Conversation) -> str:
    """A conversation without a template: its texts, a line each."""
    contents = (message.get("content") for message in messages)
    return "\n".join(text for text in contents if isinstance(text, str))


def packed_samples(encode: Encode, texts: Iterable[str], called: str, num_samples: int, length: int) -> Ids:
    """Samples that each begin with the beginning of a text.

    Args:
        encode: the model's tokenizer.
        texts: conversations as text.
        called: what they are, for the refusal.
        num_samples: samples wanted; fewer where the texts end.
        length: tokens per sample.

    Returns:
        int64 [samples, length].

    Raises:
        UsageError: less than one sample.
    """
    rows: list[list[int]] = []
    row: list[int] = []
    for text in texts:
        row += encode(text, False)
        if len(row) >= length:
            rows.append(row[:length])
            row = []
        if len(rows) == num_samples:
            break
    if not rows:
        raise UsageError(
            f"{called}: found conversations of {len(row)} tokens, one sample takes {length}; give more of them or a "
            "smaller sample_len"
        )
    return np.array(rows, np.int64)
