"""Tokens that tell Whisper what to do, from ``generation_config.json``, where it is silent from ``config.json``.

    <|startofprev|> text before … <|startoftranscript|> <|en|> <|transcribe|> <|notimestamps|>  words … <|endoftext|>
    <|startoftranscript|> <|en|> <|translate|>  <|0.00|> words <|4.20|> <|4.20|> words <|7.00|> … <|endoftext|>

``lang_to_id`` and ``task_to_id`` name languages and tasks; a model for English alone has neither, and no such tokens in
its prompt.  The token of a time, 0.02 s apart, follows ``no_timestamps_token_id``; the one before that says that nobody
speaks.  Which language a model takes where nobody says (``language``, or the older ``forced_decoder_ids``) is the
checkpoint's; where it says nothing either the language is heard first.

Source: https://arxiv.org/abs/2212.04356, section 2.3; transformers' generation_whisper.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from roundexport.errors import ArtifactError, UnsupportedError, UsageError
from roundexport.runtime.start_tokens import StartTokens

ENGLISH = "en"


@dataclass(frozen=True)
class SpeechTokens:
    """Ids of a model's special tokens.

    Args:
        begin: how a transcript begins, and what is never written.
        no_timestamps: asks for words without times; the times follow it.
        previous: begins the text before; None: the model takes none.
        languages: code -> id; empty for a model of English alone.
        tasks: name -> id.
        language: what is spoken where nobody says; None: it is heard.
        latest_start: last time, counted in steps, that the first words may begin at; None: any.
    """

    begin: StartTokens
    no_timestamps: int
    previous: int | None
    languages: Mapping[str, int]
    tasks: Mapping[str, int]
    language: str | None
    latest_start: int | None

    @property
    def start(self) -> int:
        """Begins every transcript."""
        return self.begin.decoder_start

    @property
    def times(self) -> int:
        """The token of the time 0."""
        return self.no_timestamps + 1

    @property
    def no_speech(self) -> int:
        """The token whose probability says that nobody speaks."""
        return self.no_timestamps - 1

    def language_id(self, code: str) -> int:
        """The token of a language.

        Raises:
            UsageError: the model has none for it.
        """
        if code not in self.languages:
            known = ", ".join(self.languages) or f"{ENGLISH} alone"
            raise UsageError(f"the model does not know the language {code!r}; it knows {known}")
        return self.languages[code]

    def prompt(self, language: str, task: str, timestamps: bool) -> list[int]:
        """What the transcript begins with.

        Raises:
            UsageError: a language or a task that the model does not know.
        """
        found = [self.start]
        if self.languages:
            found.append(self.language_id(language))
            if task not in self.tasks:
                raise UsageError(f"the model has no task {task!r}; it has {', '.join(self.tasks) or 'none'}")
            found.append(self.tasks[task])
        elif language != ENGLISH or task != "transcribe":
            raise UsageError(f"the model only writes down English; it cannot {task} the language {language!r}")
        return found if timestamps else [*found, self.no_timestamps]


def read_tokens(
    generation: Mapping[str, Any], config: Mapping[str, Any], begin: StartTokens, vocab_size: int, where: str
) -> SpeechTokens:
    """The tokens that a package's files name.

    Args:
        generation: ``generation_config.json``.
        config: ``config.json``.
        begin: how a transcript begins, and what is never written.
        vocab_size: width of the logits.
        where: the folder, for messages.

    Raises:
        ArtifactError: an id that is not one, or none where one must be.
        UnsupportedError: files of before 2023, which do not name the times.
    """
    reader = _Reader({**config, **generation}, vocab_size, where)
    times = reader.one("no_timestamps_token_id")
    if times is None:
        raise UnsupportedError(f"{where}: generation_config.json names no no_timestamps_token_id; take the file of the "
                               "checkpoint's newest revision")  # fmt: skip
    languages = {name.strip("<|>"): token for name, token in reader.named("lang_to_id").items()}
    latest = reader.found.get("max_initial_timestamp_index")
    if latest is not None and (not isinstance(latest, int) or isinstance(latest, bool) or latest < 0):
        raise ArtifactError(f"{where}: max_initial_timestamp_index must be a whole number, not {latest!r}")
    return SpeechTokens(
        begin=begin,
        no_timestamps=times,
        previous=reader.one("prev_sot_token_id"),
        languages=languages,
        tasks=reader.named("task_to_id"),
        language=_language(reader, languages),
        latest_start=latest,
    )


class _Reader:
    """Ids by key, each checked."""

    def __init__(self, found: Mapping[str, Any], vocab_size: int, where: str) -> None:
        self.found = found
        self._size = vocab_size
        self._where = where

    def one(self, key: str) -> int | None:
        value = self.found.get(key)
        return None if value is None else self._id(value, key)

    def named(self, key: str) -> dict[str, int]:
        values = self.found.get(key) or {}
        if not isinstance(values, dict):
            raise ArtifactError(f"{self._where}: {key} must be an object of names and token ids, not {values!r}")
        return {name: self._id(value, key) for name, value in values.items()}

    def _id(self, value: object, key: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < self._size:
            raise ArtifactError(f"{self._where}: {key} names the token {value!r}; ids are 0 to {self._size - 1}")
        return value


def _language(reader: _Reader, languages: Mapping[str, int]) -> str | None:
    """The language where nobody says."""
    if not languages:
        return ENGLISH
    said = reader.found.get("language")
    if isinstance(said, str) and said.strip("<|>") in languages:
        return said.strip("<|>")
    forced = reader.found.get("forced_decoder_ids")
    if isinstance(forced, list) and forced and isinstance(forced[0], list) and forced[0][:1] == [1]:
        return next((code for code, token in languages.items() if token == forced[0][-1]), None)
    return None
