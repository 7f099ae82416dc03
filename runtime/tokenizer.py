"""Text to tokens and back, from the tokenizer files of a package; no transformers.

`tokenizer.json` is read by the `tokenizers` library.  `tokenizer_config.json` and `chat_template.jinja` give the
special tokens and the chat template, which is rendered as transformers does it: Jinja2's immutable sandbox, blocks
trimmed, `raise_exception`, `strftime_now` and a `tojson` that keeps non-ASCII text.  A template comes from a model's
author, so it may neither change what it is given nor reach Python's internals.

Turning tokens into text one by one is harder than it looks: a character may span tokens, and a token may decode
differently behind others (a leading space is dropped at the start of a text).  `Detokenizer` therefore decodes a short
window twice, with and without the new tokens, and gives the difference once it no longer ends in an unfinished
character.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Encoding
from tokenizers import Tokenizer as RawTokenizer

from roundexport.errors import ArtifactError, UnsupportedError, UsageError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
Message = dict[str, Any]


class Tokenizer:
    """A package's tokenizer and chat template.

    Args:
        folder: package folder with ``tokenizer.json``.

    Raises:
        ArtifactError: the file is missing or unreadable.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ArtifactError(f"{folder}: no tokenizer.json; text needs one, token ids do not")
        try:
            self._raw = RawTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ArtifactError(f"{path}: not a tokenizer that the tokenizers library reads: {error}") from error
        self._raw.no_padding()  # batches are padded where they are made
        self._raw.no_truncation()
        self._config = read_json(folder / "tokenizer_config.json")
        self._template = _chat_template(folder, self._config)
        self._compiled: jinja2.Template | None = None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._raw.get_vocab_size()

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat_prompt` works."""
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer puts around one unless told otherwise."""
        return self._raw.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], max_length: int | None = None) -> list[Encoding]:
        """Ids and type ids of several texts, cut to ``max_length`` tokens, special tokens kept."""
        if max_length is None:
            return self._raw.encode_batch(list(texts))
        self._raw.enable_truncation(max_length)
        try:
            return self._raw.encode_batch(list(texts))
        finally:
            self._raw.no_truncation()

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special tokens left out."""
        return self._raw.decode(list(ids), skip_special_tokens=True)

    def chat_prompt(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text that a chat model reads.

        Args:
            messages: ``{"role": "user", "content": "…"}`` and so on.
            add_generation_prompt: end with the opening of the assistant's answer.
            **variables: further names the template knows (``tools``, ``enable_thinking``, …).

        Raises:
            UnsupportedError: the package has no chat template.
            UsageError: the template refuses these messages.
        """
        if self._template is None:
            raise UnsupportedError("this package has no chat template; give a plain prompt instead")
        try:
            if self._compiled is None:
                self._compiled = _environment().from_string(self._template)
            return self._compiled.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self._special(), **variables
            )
        except jinja2.TemplateError as error:
            raise UsageError(f"the chat template refuses these messages: {error}") from error

    def encode_chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Token ids of a conversation; the template writes its special tokens itself."""
        return self.encode(self.chat_prompt(messages, **variables), add_special_tokens=False)

    def _special(self) -> dict[str, str]:
        names = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
        found = {name: self._config.get(name) for name in names}
        return {n: v["content"] if isinstance(v, dict) else v for n, v in found.items() if v is not None}


class Detokenizer:
    """Text of one row as its tokens arrive; pieces joined are the decoded text, never with half a character.

    Bytes that can never become a character come out as U+FFFD once something follows them; an unfinished character at
    the very end is left out.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # tokens of the last piece given, as context, then tokens not given yet
        self._context = 0
        self._given = ""  # text of the context alone

    def push(self, token: int) -> str:
        """Text that this token completes; empty while a character is unfinished."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        if text.endswith(REPLACEMENT) or len(text) <= len(self._given):
            return ""
        piece = text[len(self._given) :]
        self._window = self._window[self._context :]
        self._context = len(self._window)
        self._given = self._tokenizer.decode(self._window)
        return piece

    def finish(self) -> str:
        """Text still held back, without an unfinished character at its end."""
        text = self._tokenizer.decode(self._window).rstrip(REPLACEMENT)
        self._window, self._context = [], 0
        piece, self._given = text[len(self._given) :], ""
        return piece


class _GenerationTag(Extension):
    """``{% generation %} … {% endgeneration %}`` marks an assistant's text for training; here it only shows it."""

    tags = {"generation"}  # noqa: RUF012  (the name and type jinja2 asks for)

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The newest place wins: chat_template.jinja, then tokenizer_config.json (one text, or a list with names)."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found if isinstance(found, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path}: not JSON: {error}") from error
    return found if isinstance(found, dict) else {}
