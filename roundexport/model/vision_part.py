"""The part of a folder that reads images: its config, and which tensors are its own.

Of two towers, such as CLIP's and SigLIP's, the image encoder:

    vision_model.encoder.layers.0…      the encoder
    visual_projection.weight            from its vector to the one that texts are compared with, where there is such

What comes out is the vector that the whole model compares: transformers' `get_image_features`, not yet scaled to length
one.  Of a vision-language model its tower and projector, see image_features.py:

    model.vision_tower…    vision_tower.vision_model…    model.vision_model…      the tower
    model.multi_modal_projector…    model.connector…                              the projector
    model.visual…    visual…                                                      both, of Qwen-VL

Nothing of another part is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from roundexport.errors import CheckpointError

from .text_part import deep_features

PROJECTION = "visual_projection."
_OWN = ("vision_model.", PROJECTION)
_SIDE = re.compile(
    r"^(?:model\.)?(vision_tower|vision_model|visual|multi_modal_projector|connector)\.(?:vision_model\.)?"
)
_FEATURES = "features"  # width of what the language model reads
RENAMING = {_SIDE.pattern: r"model.\1."}
"""The file's names to those of the image side by itself, of a vision-language model."""


def has_towers(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an image encoder and a text encoder side by side."""
    architectures = config.get("architectures") or [""]
    named = str(architectures[0]) if isinstance(architectures, list) else ""
    nested = (config.get("vision_config"), config.get("text_config"))
    return named.endswith("Model") and all(isinstance(one, Mapping) for one in nested)


def has_image_side(config: Mapping[str, Any]) -> bool:
    """Whether a config.json with a language model is also that of a tower of images."""
    text = config.get("text_config", config)  # older Qwen-VL files have the language model's keys beside the tower's
    return isinstance(config.get("vision_config"), Mapping) and isinstance(text, Mapping) and "hidden_size" in text


def has_features(config: Mapping[str, Any]) -> bool:
    """Whether what :func:`vision_config` gave is of the image side of a vision-language model."""
    return _FEATURES in config


def feature_width(config: Mapping[str, Any]) -> int | None:
    """Width of a feature of such an image side; None of another encoder."""
    found = config.get(_FEATURES)
    return found if isinstance(found, int) else None


def vision_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the image encoder: the nested values; of a vision-language model with its own type."""
    if not has_towers(config):
        nested, text = config["vision_config"], config.get("text_config", config)
        return {
            **nested,
            "model_type": config.get("model_type"),
            _FEATURES: text["hidden_size"] * (1 + deep_features(nested)),
        }
    projected = {} if config.get("projection_dim") is None else {"projection_dim": config["projection_dim"]}
    return {"model_type": f"{config.get('model_type')}_vision_model", **config["vision_config"], **projected}


def vision_names(stored: Iterable[str], where: str) -> dict[str, str]:
    """Names of the image encoder's tensors.

    Args:
        stored: names in the checkpoint's files.
        where: the model, for the error.

    Returns:
        Name in the encoder by itself, with its prefix -> name in the file; the other tower is left out.

    Raises:
        CheckpointError: there are none.
    """
    stored = list(stored)
    found = {name: name for name in stored if name.startswith(_OWN)}
    if any(_SIDE.match(name) and name not in found for name in stored):
        found = {_SIDE.sub(r"model.\1.", name): name for name in stored if _SIDE.match(name)}
    if not found:
        raise CheckpointError(f"{where}: no tensor of an image encoder is among the weights ({', '.join(_OWN)})")
    return found
