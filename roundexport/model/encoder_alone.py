"""The encoder of a model with two halves, by itself: T5EncoderModel and its like, of sentence-t5, GTR and image models.

    config.json    `architectures` names the class; `is_encoder_decoder` may be true all the same, as it was trained so
    tables         shared.weight and encoder.embed_tokens.weight are one table; files hold one of them, or both
    decoder        its tensors, where a file has them, are left out

Source: `T5EncoderModel` of transformers 5.23, `_tied_weights_keys` and `_keys_to_ignore_on_load_unexpected`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CLASSES = frozenset(["T5EncoderModel", "MT5EncoderModel", "UMT5EncoderModel"])
_TABLES = ("shared.weight", "encoder.embed_tokens.weight")


def is_encoder_alone(architecture: str) -> bool:
    """Whether transformers' class of this name is an encoder whose config is that of a model with two halves."""
    return architecture in _CLASSES


def encoder_names(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """Names of the encoder's tensors, its table under both of its names.

    Args:
        config: of the model.
        names: name in the model -> name in the file.

    Returns:
        The same as it is, unless the config names such a class.
    """
    if not is_encoder_alone(str((config.get("architectures") or [""])[0])):
        return dict(names)
    own = {name: stored for name, stored in names.items() if not name.startswith(("decoder.", "lm_head."))}
    table = next((own[name] for name in _TABLES if name in own), None)
    return own if table is None else {**dict.fromkeys(_TABLES, table), **own, _TABLES[1]: table}
