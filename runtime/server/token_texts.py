r"""Texts and bytes of single tokens, for log-probabilities: a token may be half a character.

    byte-level vocabulary (GPT-2, Llama 3, Qwen)      each letter stands for one byte       "Ġthe" → b" the"
    byte fallback (Llama 2, Gemma)                    <0xE2> is that byte, ▁ a space        "▁the" → b" the"
    others (WordPiece)                                what the token decodes to by itself

Bytes that are not a character by themselves show as U+FFFD in the text; the bytes are exact.  Where tokens are keys
(completions), such a token is written ``bytes:\xe2``, as OpenAI does, so that two of them stay two.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache

from roundexport.runtime.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_KEPT = 65536  # tokens whose bytes are remembered


class TokenTexts:
    """What single tokens stand for.

    Args:
        tokenizer: the package's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._raw = tokenizer.raw
        description = json.loads(tokenizer.raw.to_str())
        decoder = json.dumps(description.get("decoder"))
        self._byte_level = '"ByteLevel"' in decoder
        self._fallback = '"ByteFallback"' in decoder or "▁" in json.dumps(
            description.get("decoder"), ensure_ascii=False
        )
        self._added = {token["id"]: token["content"] for token in description.get("added_tokens", [])}
        self.bytes = lru_cache(_KEPT)(self._bytes)

    def text(self, token: int) -> str:
        """The token as text."""
        return self.bytes(token).decode("utf-8", "replace")

    def key(self, token: int) -> str:
        r"""The token as a text of its own: half a character is told by its bytes, as ``bytes:\xe2\x80``."""
        data = self.bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _bytes(self, token: int) -> bytes:
        if token in self._added:
            return str(self._added[token]).encode()
        piece = self._raw.id_to_token(token)
        if piece is None:  # an id that pads the vocabulary
            return b""
        if self._byte_level and all(letter in _LETTERS for letter in piece):
            return bytes(_LETTERS[letter] for letter in piece)
        if self._fallback:
            found = _BYTE.fullmatch(piece)
            return bytes([int(found[1], 16)]) if found else piece.replace("▁", " ").encode()
        return str(self._raw.decode([token], skip_special_tokens=False)).encode()


def _letters() -> dict[str, int]:
    """Letter -> byte of byte-level vocabularies: printable Latin-1 stands for itself, the rest for U+0100 onwards."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


_LETTERS = _letters()
