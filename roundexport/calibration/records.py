"""Records of a .jsonl file or a dataset: texts, or conversations.

    {"text": "…"}                    a text; also content, document
    {"messages": [{"role": "user", "content": "…"}, …]}
    {"conversations": [{"from": "human", "value": "…"}, …]}     as ShareGPT has it

The first record says which column is read, conversations before texts; every other one must have it, too.
Texts are joined by blank lines.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from roundexport.errors import UsageError

from .text import read_text

Record = Mapping[str, Any]
Conversation = list[dict[str, Any]]

TEXTS = ("text", "content", "document")
CHATS = ("messages", "conversations")
SUFFIXES = (".jsonl", ".ndjson")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}  # others keep their names


class Records:
    """Records of one kind.

    Args:
        called: what they are, for errors.
        records: the records, each read once.

    Attributes:
        column: the column that is read.

    Raises:
        UsageError: there are none, or the first has no column that is read.
    """

    def __init__(self, called: str, records: Iterable[Record]) -> None:
        self._called = called
        source = iter(records)
        first = next(source, None)
        if first is None:
            raise UsageError(f"{called}: there are no records in it")
        self._records = itertools.chain([first], source)
        known = [name for name in CHATS if isinstance(first.get(name), list)]
        known += [name for name in TEXTS if isinstance(first.get(name), str)]
        if not known:
            raise UsageError(
                f"{called}: its records have the columns {', '.join(first)}; one of {', '.join(TEXTS)} (a text) or "
                f"{', '.join(CHATS)} (a list of messages) is needed"
            )
        self.column = known[0]

    @property
    def conversations(self) -> bool:
        """Whether they are conversations."""
        return self.column in CHATS

    def texts(self) -> Iterator[str]:
        """The texts."""
        for number, record in enumerate(self._records, 1):
            text = record.get(self.column)
            if not isinstance(text, str):
                raise UsageError(f"{self._called}: record {number} has no {self.column} that is a text")
            _check_unicode(text, f"{self._called}: record {number}")
            yield text

    def messages(self) -> Iterator[Conversation]:
        """The conversations, each as ``[{"role": …, "content": …}, …]``."""
        for number, record in enumerate(self._records, 1):
            where, found = f"{self._called}: record {number}", record.get(self.column)
            if not isinstance(found, list) or not found:
                raise UsageError(f"{where} has no {self.column} that is a list of messages")
            _check_unicode(found, where)
            yield [_message(entry, where) for entry in found]


def read_lines(path: Path, called: str) -> Iterator[Record]:
    """The objects of a .jsonl file; blank lines are passed over.

    Raises:
        UsageError: a line is not a JSON object, or the file is not UTF-8.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{called}: line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise UsageError(f"{called}: line {number} holds {type(record).__name__}; every line is one JSON object")
        yield record


def joined_texts(texts: Iterable[str], enough: int) -> str:
    """Texts joined by blank lines, no more of them than give so many characters."""
    found, total = [], 0
    for text in itertools.islice(texts, enough):  # of empty ones not more, either
        found.append(text)
        total += len(text)
        if total >= enough:
            break
    return "\n\n".join(found)


def _check_unicode(value: Any, where: str) -> None:
    """Refuse half of a surrogate pair, which JSON can write and no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where} holds {error.object[error.start]!a}, half of a surrogate pair, which is no character: the "
            "text was cut inside one; write both halves, or leave it out"
        ) from error


def _message(entry: Any, where: str) -> dict[str, Any]:
    """A message in the form that chat templates read."""
    if isinstance(entry, dict) and "from" in entry:
        entry = {"role": _ROLES.get(str(entry["from"]), entry["from"]), "content": entry.get("value")}
    if not isinstance(entry, dict) or not isinstance(entry.get("role"), str):
        raise UsageError(f"{where}: a message is an object with role and content, or with from and value; not {entry}")
    if not isinstance(entry.get("content"), str | list) and not entry.get("tool_calls"):
        raise UsageError(f"{where}: the message of {entry['role']} has no content")
    return entry
