"""Text of one row as its tokens arrive: pieces joined are the decoded text, never with half a character.

Turning tokens into text one by one is harder than it looks: a character may span tokens, and a token may decode
differently behind others (a leading space is dropped at the start of a text).  `tokenizers.decoders.DecodeStream`
decodes a short window with and without the new token and gives the difference once it no longer ends in an unfinished
character.  What it still holds back at the end is found here, by decoding the row once as a whole.

Rule for the end: bytes that can never become a character come out as U+FFFD once something follows them; an unfinished
character at the very end is left out.
"""

from __future__ import annotations

from collections.abc import Collection

from tokenizers.decoders import DecodeStream

from .tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """One row's text.

    Args:
        tokenizer: the package's tokenizer.
        show: special tokens whose text is shown; the row is decoded in parts, between them.
    """

    def __init__(self, tokenizer: Tokenizer, show: Collection[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._show = {tokenizer.raw.token_to_id(text): text for text in show}
        self._begin()

    def _begin(self) -> None:
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._given = 0  # characters

    def push(self, token: int) -> str:
        """Text that this token completes; empty while a character is unfinished."""
        if token in self._show:
            piece = self.finish() + self._show[token]
            self._begin()
            return piece
        self._tokens.append(token)
        try:
            piece = self._stream.step(self._tokenizer.raw, token) or ""
        except Exception:  # a decoder that changes text behind it (WordPiece's clean-up): the rest comes at the end
            return ""
        self._given += len(piece)
        return piece

    def finish(self) -> str:
        """Text still held back, without an unfinished character at its end."""
        text = self._tokenizer.decode(self._tokens).rstrip(REPLACEMENT)
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        return piece
