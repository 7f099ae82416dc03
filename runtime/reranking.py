"""Rerankers made of a decoder: a query and a document in the chat template, one number out.

    [system: the model's prompt, if it has one]  query: …  document: …   ──template──▶ tokens ──graph──▶ yes - no

Where both are too long for the model the longer text is cut first, so that what the template writes around them stays.
The score is the sigmoid of that number, the likelihood of "yes" beside "no", unless the folder names another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from roundexport.errors import UsageError
from roundexport.formats.package import PackageManifest
from roundexport.storage.paths import ListedFiles

from .chat_template import Message
from .classifying import Classifier
from .labels import Labels
from .prompts import FILE, read_prompts
from .tokenizer import Text, read_json
from .types import EncoderBackend

_Rows = tuple[list[list[int]], list[list[int]]]


class Reranker(Classifier):
    """A package that says how relevant documents are to a query, by a decoder's word."""

    def __init__(self, backend: EncoderBackend, manifest: PackageManifest, folder: Path) -> None:
        super().__init__(backend, manifest, folder)
        self._labels = Labels(("relevance",), "sigmoid")
        files = ListedFiles(folder, manifest.files)
        prompt = read_prompts(files.find(FILE)).choose(None, None)
        config = read_json(files.find("sentence_bert_config.json"))
        self._in_parts = _at(config, "modality_config", "message", "format") == "structured"
        told = _at(config, "processing_kwargs", "chat_template")
        self._variables = {"add_generation_prompt": False, **(told if isinstance(told, dict) else {})}
        for own in ("restore_suffix", "truncation", "padding", "max_length", "return_tensors"):
            self._variables.pop(own, None)
        self._front = [self._message("system", prompt)] if prompt else []

    def rows_of(self, texts: Sequence[Text]) -> _Rows:
        """Token ids and type ids of pairs (query, document), cut to ``max_length``.

        Raises:
            UsageError: a text that is not a pair, or a query that leaves no room for the document.
        """
        if single := next((text for text in texts if isinstance(text, str)), None):
            raise UsageError(f"a reranker reads pairs (query, document), not a single text: {single[:60]!r}")
        rows = [self._row(text[0], text[1], self.max_length) for text in texts]
        return rows, [[0] * len(row) for row in rows]

    def pairs(self, query: str, documents: Sequence[str], max_length: int | None = None) -> _Rows:
        """The same of a query with each of several documents; None: not cut."""
        rows = [self._row(query, document, max_length) for document in documents]
        return rows, [[0] * len(row) for row in rows]

    def _row(self, query: str, document: str, most: int | None) -> list[int]:
        ids = self._templated(query, document)
        if most is None or len(ids) <= most:
            return ids
        first, second = (len(self.tokenizer.encode(text, add_special_tokens=False)) for text in (query, document))
        room = most - (len(ids) - first - second)
        while len(ids) > most:
            least = min(first, second, room // 2)
            if least < 1:
                raise UsageError(f"{most} tokens leave no room for a query and a document beside the template")
            lengths = (least, room - least) if first <= second else (room - least, least)
            parts = [self.tokenizer.beginning(*pair) for pair in zip((query, document), lengths, strict=True)]
            ids = self._templated(*parts)
            room -= max(len(ids) - most, 0)  # tokens at the seams may be others
        return ids

    def _templated(self, query: str, document: str) -> list[int]:
        pair = [self._message("query", query), self._message("document", document)]
        return self.tokenizer.encode_chat([*self._front, *pair], **self._variables)

    def _message(self, role: str, text: str) -> Message:
        return {"role": role, "content": [{"type": "text", "text": text}] if self._in_parts else text}


def _at(config: Mapping[str, Any], *keys: str) -> Any:
    """What lies under nested keys; None where something on the way is missing."""
    found: Any = config
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found
