"""Text to tokens and back, from the tokenizer files of a package; no transformers.

`tokenizer.json` is read by the `tokenizers` library.  `tokenizer_config.json` gives the texts of the special tokens
and, like `chat_template.jinja`, the chat template (chat_template.py).  Streaming is in detokenizer.py.

One tokenizer serves many threads, so nothing about it changes after it is opened: texts are cut here, and not by the
library's truncation, which is a switch on the shared object.  The result is the library's: tokens of the bare text, cut
so that the special tokens fit, then special tokens put around.

The library reports most faults as a bare `Exception`, and some as a `PanicException`, which is not even one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as RawTokenizer

from roundexport.errors import ArtifactError, RoundexportError, UnsupportedError, UsageError
from roundexport.storage.paths import ListedFiles

from .chat_template import Message, choose, read_templates

Text = str | tuple[str, str]
"""A text, or a pair of texts that the model reads together."""

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


class Tokenizer:
    """A package's tokenizer and chat template; may be used by several threads.

    Args:
        folder: package folder with ``tokenizer.json``.
        listed: files that the package's manifest lists, which alone are read; None: a model's folder, of which all is.

    Attributes:
        token_types: whether the model is told which text of a pair a token is of; else all are of the first.

    Raises:
        ArtifactError: a file is missing, unreadable or makes no sense, or a link that leaves the folder.
    """

    def __init__(self, folder: Path, listed: Collection[str] | None = None) -> None:
        files = ListedFiles(folder, listed)
        path = files.find("tokenizer.json")
        if path is None:
            raise ArtifactError(f"{folder}: no tokenizer.json; text needs one, token ids do not")
        self._path = path
        with self._library("not a tokenizer that the tokenizers library reads"):
            self.raw = RawTokenizer.from_file(str(self._path))
            self.raw.no_padding()  # batches are padded where they are made
            self.raw.no_truncation()
        where = folder / "tokenizer_config.json"
        config = read_json(files.find(where.name))
        self._special = _special_tokens(config, where)
        names = config.get("model_input_names")
        self.token_types = not isinstance(names, list) or "token_type_ids" in names
        jinja = _read_text(files.find("chat_template.jinja"))
        if jinja is None and (beside := read_json(files.find("chat_template.json"))):  # of a processor of pictures
            config = {**config, "chat_template": beside.get("chat_template")}
        self._templates = read_templates(jinja, config, str(where))

    @contextmanager
    def _library(self, otherwise: str) -> Iterator[None]:
        """Turn whatever the library raises into an error that names the file."""
        try:
            yield
        except (RoundexportError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
            raise
        except BaseException as error:
            raise ArtifactError(f"{self._path}: {otherwise}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.raw.get_vocab_size()

    def special_text(self, name: str) -> str | None:
        """Text of a special token, as ``mask_token``; None where tokenizer_config.json names none."""
        return self._special.get(name)

    def special_id(self, name: str) -> int | None:
        """Id of a special token; None where there is none."""
        text = self._special.get(name)
        return None if text is None else self.raw.token_to_id(text)

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat_prompt` works."""
        return bool(self._templates)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer puts around one unless told otherwise.

        Raises:
            UsageError: the text is not Unicode text (half of a surrogate pair).
            ArtifactError: the tokenizer fails on it.
        """
        _check_text(text)
        with self._library("the tokenizer fails on this text"):
            # As a batch of one: only batches let other threads run meanwhile, and a long text takes seconds.
            return self.raw.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def encode_batch(self, texts: Sequence[Text], max_length: int | None = None) -> list[Encoding]:
        """Ids and type ids of several texts or pairs of texts, cut to ``max_length`` tokens, special tokens kept.

        Of a pair the longer text is cut first, until both are equally long.

        Raises:
            UsageError: a text is not Unicode text, or ``max_length`` leaves no room beside the special tokens.
            ArtifactError: the tokenizer fails on one.
        """
        paired = [isinstance(text, tuple) for text in texts]
        parts = [part for text in texts for part in (text if isinstance(text, tuple) else (text,))]
        for part in parts:
            _check_text(part)
        with self._library("the tokenizer fails on these texts"):
            if max_length is None:
                return self.raw.encode_batch(list(texts))
            found = iter(self.raw.encode_batch(parts, add_special_tokens=False))
            return [self._cut(next(found), next(found) if pair else None, max_length) for pair in paired]

    def _cut(self, first: Encoding, second: Encoding | None, max_length: int) -> Encoding:
        """A text, or a pair, of at most so many tokens, special ones included."""
        room = max_length - self.raw.num_special_tokens_to_add(second is not None)
        if room < 1 + (second is not None):
            raise UsageError(f"{max_length} tokens leave no room for text beside the tokenizer's special tokens")
        if second is None:
            first.truncate(room)
            return self.raw.post_process(first, None, True)
        least = min(len(first), len(second), room // 2)
        lengths = (least, room - least) if len(first) <= len(second) else (room - least, least)
        for encoding, length in zip((first, second), lengths, strict=True):
            encoding.truncate(length)
        return self.raw.post_process(first, second, True)

    def beginning(self, text: str, count: int) -> str:
        """The part of a text that its first ``count`` tokens stand for.

        Raises:
            UsageError: the text is not Unicode text.
            ArtifactError: the tokenizer fails on it.
        """
        _check_text(text)
        with self._library("the tokenizer fails on this text"):
            found = self.raw.encode_batch([text], add_special_tokens=False)[0]
        return text if len(found) <= count else text[: found.offsets[count - 1][1]]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens; special tokens, and ids for which there is no token, have none."""
        with self._library("the tokenizer cannot write these tokens"):
            return self.raw.decode(list(ids), skip_special_tokens=True)

    def chat_prompt(
        self, messages: Sequence[Message], /, *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text that a chat model reads.

        Args:
            messages: ``{"role": "user", "content": "…"}`` and so on.
            add_generation_prompt: end with the opening of the assistant's answer.
            **variables: further names the template knows (``tools``, ``enable_thinking``, …).

        Raises:
            UnsupportedError: the package has no chat template.
            UsageError: the template refuses these messages, or wants more time or memory than it may use.
        """
        if not self._templates:
            raise UnsupportedError("this package has no chat template; give a plain prompt instead")
        template = choose(self._templates, variables.get("tools"))
        values = {"tools": None, "documents": None, **self._special, **variables}
        return template.render(messages, add_generation_prompt=add_generation_prompt, **values)

    def template_source(self, *, tools: bool = False) -> str | None:
        """The text of the chat template, for conversations with or without tools; None where there is none."""
        return choose(self._templates, [] if tools else None).source if self._templates else None

    def encode_chat(self, messages: Sequence[Message], /, **variables: Any) -> list[int]:
        """Token ids of a conversation; the template writes its special tokens itself."""
        return self.encode(self.chat_prompt(messages, **variables), add_special_tokens=False)


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise UsageError(f"a text is a string, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the text is not Unicode text: character {error.start + 1} is half of a surrogate pair "
            f"({text[error.start]!r}); decode the input as UTF-8"
        ) from error


def _special_tokens(config: Mapping[str, Any], where: Path) -> dict[str, str]:
    """Texts of the special tokens that a template may write."""
    found = {}
    for name in _SPECIAL:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if value is not None and not isinstance(value, str):
            raise ArtifactError(f"{where}: {name} must be a text, an object with its content, or null, not {value!r}")
        if value is not None:
            found[name] = value
    return found


def _read_text(path: Path | None) -> str | None:
    """A text file; None where there is none."""
    if path is None or not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ArtifactError(f"{path}: not UTF-8: {error}") from error


def read_json(path: Path | None) -> dict[str, Any]:
    """A JSON object from a file; empty where there is no file.

    Raises:
        ArtifactError: it is not JSON, or not an object.
    """
    text = _read_text(path)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found
