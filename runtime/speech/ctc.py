"""From the likeliest word of every frame to a text: connectionist temporal classification, greedily.

    h h _ e _ l l _ l o o   ──repeats become one──▶   h _ e _ l _ l o   ──blanks go──▶   h e l l o

``_`` is the blank, by which a letter that is there twice is told from one that lasts.  Words are letters, syllables or
pieces; one of them, the delimiter, stands for the space between words.

Source: Graves et al., Connectionist Temporal Classification (2006); transformers' Wav2Vec2CTCTokenizer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from roundexport.errors import ArtifactError, UnsupportedError
from roundexport.runtime.tokenizer import read_json
from roundexport.storage.paths import ListedFiles

VOCABULARY, SETTINGS = "vocab.json", "tokenizer_config.json"
_SILENT = ("bos_token", "eos_token", "unk_token")
_USUAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


@dataclass(frozen=True)
class Spoken:
    """A word of a text, and the frames in which it was said.

    Args:
        text: the word.
        tokens: its letters' ids.
        start: its first frame.
        end: one past its last.
    """

    text: str
    tokens: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class CtcVocabulary:
    """What ids stand for.

    Args:
        letters: by id; "" for what is never written.
        blank: the id of "nothing new".
        delimiter: the id between words; None: there is none.
        lower: texts are written in small letters.
    """

    letters: tuple[str, ...]
    blank: int
    delimiter: int | None = None
    lower: bool = False

    def words(self, ids: Sequence[int]) -> list[Spoken]:
        """The words that ids say, one of each frame."""
        found: list[Spoken] = []
        letters: list[int] = []
        frame = start = end = 0
        for token, run in groupby(ids):
            length = sum(1 for _ in run)
            if token == self.delimiter:
                found += self._word(letters, start, end)
                letters = []
            elif token != self.blank and self.letters[token]:
                start = start if letters else frame
                letters.append(token)
                end = frame + length
            frame += length
        return [*found, *self._word(letters, start, end)]

    def text(self, ids: Sequence[int]) -> str:
        """The text that ids say, one of each frame."""
        return " ".join(word.text for word in self.words(ids))

    def _word(self, letters: list[int], start: int, end: int) -> list[Spoken]:
        text = "".join(self.letters[token] for token in letters).strip()
        return [Spoken(text.lower() if self.lower else text, tuple(letters), start, end)] if text else []


def read_vocabulary(folder: Path, blank: int | None, size: int, listed: Collection[str] | None = None) -> CtcVocabulary:
    """The vocabulary of a folder.

    Args:
        folder: package folder.
        blank: the model's id for it; None: the tokenizer's padding.
        size: ids of the model.
        listed: files that the package's manifest lists, which alone are read; None: all.

    Raises:
        ArtifactError: there is none, or it makes no sense.
        UnsupportedError: several vocabularies in one file.
    """
    files, where = ListedFiles(folder, listed), folder / VOCABULARY
    ids = read_json(files.find(VOCABULARY))
    if not ids:
        raise ArtifactError(f"{folder}: no {VOCABULARY}, which says what the model's ids stand for")
    if any(isinstance(value, dict) for value in ids.values()):
        raise UnsupportedError(f"{where}: vocabularies of several languages; save the model with one of them")
    wrong = [name for name, one in ids.items() if not isinstance(one, int) or isinstance(one, bool) or one < 0]
    if wrong:
        raise ArtifactError(f"{where}: {wrong[0]!r:.40} must have an id of at least 0, not {ids[wrong[0]]!r:.40}")
    settings = read_json(files.find(SETTINGS))
    silent = {_content(settings.get(name), usual) for name, usual in _USUAL.items() if name in _SILENT}
    letters = [""] * size
    for text, place in ids.items():
        if place < size and text not in silent:
            letters[place] = text
    delimiter = ids.get(_content(settings.get("word_delimiter_token"), "|"))
    padding = ids.get(_content(settings.get("pad_token"), _USUAL["pad_token"]))
    chosen = padding if blank is None else blank
    if chosen is None or chosen >= size:
        raise ArtifactError(f"{folder}: no id for the blank; config.json should name one as pad_token_id")
    return CtcVocabulary(tuple(letters), chosen, delimiter, settings.get("do_lower_case") is True)


def _content(value: Any, otherwise: str) -> str:
    """The text of a special token, which files give as it is or as an object."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else otherwise
