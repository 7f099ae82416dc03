"""The language model inside a vision-language checkpoint: its config, and which of the file's tensors are its own.

A folder of `…ForConditionalGeneration` holds a decoder beside a vision tower.  Read by this file it is that decoder and
nothing else: the config is `text_config` (or the flat keys that older Qwen-VL files have beside `vision_config`), names
are those that the decoder has by itself, and no tensor of another part is ever read.

    model.language_model.layers.0…     language_model.model.layers.0…     model.text_model.layers.0…
    model.llm.layers.0…                 model.layers.0…                     all mean model.layers.0…
    language_model.lm_head.weight       lm_head.weight                      mean lm_head.weight

Positions of several axes (M-RoPE: time, height, width) are equal on text alone, so one number a token says them all.

Limits: images go nowhere.  A decoder that looks at image features inside its layers (Mllama) is refused when built.
Source: checkpoints' own names and transformers 5.23's conversion_mapping.py, which renames them the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from roundexport.errors import CheckpointError

_WHOLE = "ForConditionalGeneration"
_NESTED = r"(?:model\.)?(?:language_model|text_model|llm)\."
RENAMING = {rf"^{_NESTED}(?:model\.)?lm_head\.": "lm_head.", rf"^{_NESTED}(?:model\.)?": "model."}
"""The file's names to those of the decoder by itself: regular expressions, the first that matches counts."""
_OWN = re.compile(r"lm_head\.|model\.(layers|embed_tokens|norm)\.")
_OF_THE_WHOLE = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")


DEEP = "deepstack_visual_indexes"
"""Of a tower: blocks whose features are added behind the decoder's first ones too, beside those among its vectors."""


def deep_features(config: Mapping[str, Any]) -> int:
    """How many of them; 0 of other models, and of a decoder that was alone in its folder."""
    return len(config.get(DEEP) or ())


def has_text_part(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a decoder beside other parts."""
    architectures = config.get("architectures") or [""]
    nested = config.get("text_config")
    if not isinstance(architectures, list) or not str(architectures[0]).endswith(_WHOLE):
        return False
    if config.get("is_encoder_decoder") or (isinstance(nested, Mapping) and nested.get("is_encoder_decoder")):
        return False
    return isinstance(nested, Mapping) or isinstance(config.get("vision_config"), Mapping)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the decoder: the nested values, with those of the whole that hold for it too.

    Whether the head is the embedding is said by the whole, as in transformers.  Where it is silent the file decides: a
    head of its own there is not the embedding, unless it is equal to it.
    """
    nested = config.get("text_config")
    if not isinstance(nested, Mapping):
        flat = {key: value for key, value in config.items() if not key.endswith("_config")}
        return {"tie_word_embeddings": True, **flat}
    outer = {key: config[key] for key in _OF_THE_WHOLE if config.get(key) is not None}
    tower = config.get("vision_config")
    if isinstance(tower, Mapping) and tower.get(DEEP):
        outer[DEEP] = tower[DEEP]
    return {"model_type": config.get("model_type"), "tie_word_embeddings": True, **nested, **outer}


def text_names(stored: Iterable[str], where: str) -> dict[str, str]:
    """Names of the decoder's tensors.

    Args:
        stored: names in the checkpoint's files.
        where: the model, for the error.

    Returns:
        Name in the decoder by itself -> name in the file; other parts are left out.

    Raises:
        CheckpointError: there are none, or two names mean one tensor.
    """
    found: dict[str, str] = {}
    for name in stored:
        renamed = name
        for pattern, replacement in RENAMING.items():
            renamed, count = re.subn(pattern, replacement, name)
            if count:
                break
        else:
            if not _OWN.match(name):
                continue
        if renamed in found:
            raise CheckpointError(f"{where}: {found[renamed]} and {name} both mean {renamed} of the language model")
        found[renamed] = name
    if not found:
        raise CheckpointError(
            f"{where}: no tensor of a language model is among the weights; known: {', '.join(RENAMING)}"
        )
    return found
