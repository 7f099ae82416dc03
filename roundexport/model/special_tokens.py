"""Which ids begin a text, end it and fill it up: one answer for calibration, both targets and verification.

    generation_config.json   if it has the key with a value
    config.json              otherwise; a null there means there is none

``bos`` and ``pad`` are single ids, ``eos`` may be several, and generation stops at any of them.  A negative id means
that there is none, as some tokenizers write it.  An id at or beyond the vocabulary is refused: a runtime would read
past the embedding, or never stop.

Source: `GenerationMixin._prepare_generation_config` of transformers 5.23, which fills what is None from the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from roundexport.errors import CheckpointError
from roundexport.formats.package import Tokens

_KINDS = ("bos", "eos", "pad")


def special_tokens(config: Mapping[str, Any], generation: Mapping[str, Any], where: str = "the model") -> Tokens:
    """The special token ids of a model.

    Args:
        config: config.json.
        generation: generation_config.json; empty where there is none.
        where: the model, for the error.

    Raises:
        CheckpointError: an id that is not a whole number or lies outside the vocabulary, or several bos or pad ids.
    """
    vocabulary = config.get("vocab_size")
    found = {kind: _ids(kind, config, generation, vocabulary, where) for kind in _KINDS}
    bos, pad = (found[kind][0] if found[kind] else None for kind in ("bos", "pad"))
    return {"bos": bos, "eos": found["eos"], "pad": pad}


def first_token(tokens: Tokens) -> int | None:
    """The id a text of the model's own begins with: bos, or eos where there is none; None where neither is named."""
    if tokens["bos"] is not None:
        return tokens["bos"]
    return tokens["eos"][0] if tokens["eos"] else None


def _ids(
    kind: str, config: Mapping[str, Any], generation: Mapping[str, Any], vocabulary: int | None, where: str
) -> tuple[int, ...]:
    key = f"{kind}_token_id"
    file = "config.json" if generation.get(key) is None else "generation_config.json"
    value = config.get(key) if generation.get(key) is None else generation[key]
    values = value if isinstance(value, list) else [] if value is None else [value]
    for one in values:
        if isinstance(one, bool) or not isinstance(one, int):
            raise CheckpointError(f"{where}: {key} of {file} must be a token id or a list of them, not {value!r:.80}")
        if vocabulary is not None and one >= vocabulary:
            raise CheckpointError(
                f"{where}: {key} {one} of {file} is outside the vocabulary of {vocabulary} tokens; name the right id"
            )
    ids = tuple(dict.fromkeys(one for one in values if one >= 0))
    if kind != "eos" and len(ids) > 1:
        raise CheckpointError(f"{where}: {key} of {file} must be one id, not {list(ids)}")
    return ids
