"""How an answer of a decoder that an encoder feeds begins, and which tokens it is bound to, or may not have.

Read from generation_config.json, and where that is silent from config.json, as transformers does.

    decoder_start_token_id     first token of every answer; bos where there is none
    forced_bos_token_id        second token (the language that mBART and M2M-100 answer in)
    forced_eos_token_id        last token of an answer that reaches its limit
    suppress_tokens            never written; begin_suppress_tokens: not as the first one
    bad_words_ids of one id    never written (Marian's padding)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roundexport.errors import ArtifactError
from roundexport.formats.package import PackageManifest

from .tokenizer import read_json

_FILES = ("generation_config.json", "config.json")


@dataclass(frozen=True)
class StartTokens:
    """Tokens that an answer is bound to.

    Args:
        decoder_start: first token.
        forced_bos: second token, or None.
        forced_eos: last token of an answer that reaches its limit, or None.
        suppress: never written.
        begin_suppress: not written as the first token.
        num_beams: beams that the model's files ask for.
        length_penalty: exponent of the length that a beam's score is divided by.
        early_stopping: whether a source is finished as soon as it has enough finished beams.
        no_repeat_ngram_size: no group of so many tokens occurs twice; 0 allows all.
        max_length: most tokens of an answer, the first one included.
    """

    decoder_start: int
    forced_bos: int | None = None
    forced_eos: int | None = None
    suppress: tuple[int, ...] = ()
    begin_suppress: tuple[int, ...] = ()
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    no_repeat_ngram_size: int = 0
    max_length: int | None = None


def read_start_tokens(folder: Path, manifest: PackageManifest) -> StartTokens:
    """The tokens of a package.

    Raises:
        ArtifactError: a value makes no sense, or no token is named that an answer begins with.
    """
    files = [read_json(folder / name) if name in manifest.files else {} for name in _FILES]
    found: dict[str, Any] = {}
    for values in files:
        found.update({key: value for key, value in values.items() if found.get(key) is None})
    start = found.get("decoder_start_token_id")
    start = manifest.tokens["bos"] if start is None else start
    if not isinstance(start, int) or not _is_id(start, manifest):
        raise ArtifactError(f"{folder}: {' and '.join(_FILES)} name no decoder_start_token_id")
    return StartTokens(
        decoder_start=start,
        forced_bos=_one(found, "forced_bos_token_id", manifest, folder),
        forced_eos=_one(found, "forced_eos_token_id", manifest, folder),
        suppress=(*_several(found, "suppress_tokens", manifest, folder), *_bad_words(found)),
        begin_suppress=_several(found, "begin_suppress_tokens", manifest, folder),
        num_beams=_number(found, "num_beams", 1, int),
        length_penalty=_number(found, "length_penalty", 1.0, float),
        early_stopping=found.get("early_stopping") is True,
        no_repeat_ngram_size=_number(found, "no_repeat_ngram_size", 0, int),
        max_length=_number(found, "max_length", 0, int) or None,
    )


def _is_id(value: Any, manifest: PackageManifest) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < manifest.vocab_size


def _one(found: Mapping[str, Any], key: str, manifest: PackageManifest, folder: Path) -> int | None:
    value = found.get(key)
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if value is None or _is_id(value, manifest):
        return value
    raise ArtifactError(f"{folder}: {key} must be a token id below {manifest.vocab_size}, not {value!r:.80}")


def _several(found: Mapping[str, Any], key: str, manifest: PackageManifest, folder: Path) -> tuple[int, ...]:
    """Token ids of a list; those beyond the vocabulary, as some configs have by default, cannot be written anyway."""
    values = found.get(key) or []
    values = (
        [value for value in values if value != -1] if isinstance(values, list) else values
    )  # OpenAI's "the default"
    if isinstance(values, list) and all(isinstance(value, int) and value >= 0 for value in values):
        return tuple(value for value in values if value < manifest.vocab_size)
    raise ArtifactError(f"{folder}: {key} must be token ids, not {values!r:.80}")


def _bad_words(found: Mapping[str, Any]) -> tuple[int, ...]:
    words = found.get("bad_words_ids") or []
    return tuple(word[0] for word in words if isinstance(word, list) and len(word) == 1)


def _number(found: Mapping[str, Any], key: str, otherwise: Any, kind: type) -> Any:
    value = found.get(key)
    return otherwise if value is None or isinstance(value, bool) or not isinstance(value, int | float) else kind(value)
