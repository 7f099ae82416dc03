"""How many positions a model was made for: one answer for calibration, capture and packages.

    max_position_embeddings   of config.json; of transformers' class where the file does not say
    max_target_positions      the same for a decoder whose encoder counts otherwise
    minus pad_token_id + 1    in families whose position table starts behind the padding id: RoBERTa has 514 rows for
                              512 tokens, and a 513th reads past the table

Source: `create_position_ids_from_input_ids` of transformers 5.23, in the families listed below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .transformers_loading import read_config

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

UNBOUNDED = 4096
"""Positions of a model that sets no bound."""

_KEYS = ("max_target_positions", "max_position_embeddings", "n_positions")
_SHIFTED = frozenset(
    """
    camembert data2vec-text esm ibert layoutlmv3 lilt longformer luke markuplm mpnet roberta roberta-prelayernorm
    xlm-roberta xlm-roberta-xl xmod
    """.split()
)
_PADDING = 1  # of every family above, where config.json does not name it


def max_positions(checkpoint: Checkpoint) -> int:
    """Longest sequence of a model, special tokens included."""
    if any(checkpoint.config.get(key) for key in _KEYS):
        return positions_of(checkpoint.config)
    return positions_of_config(read_config(checkpoint.folder, checkpoint.trust_remote_code))


def positions_of_config(config: Any) -> int:
    """The same from a transformers configuration."""
    text = config.get_text_config()
    return positions_of({key: getattr(text, key, None) for key in (*_KEYS, "model_type", "pad_token_id")})


def positions_of(config: Mapping[str, Any]) -> int:
    """The same from the values of a config.json."""
    count = next((int(config[key]) for key in _KEYS if config.get(key)), UNBOUNDED)
    if config.get("model_type") not in _SHIFTED:
        return count
    padding = config.get("pad_token_id")
    return count - (_PADDING if padding is None else int(padding)) - 1
