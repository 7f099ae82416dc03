"""The image encoder in a folder of two towers, such as CLIP's and SigLIP's: its config, and which tensors are its own.

    vision_model.encoder.layers.0…      the encoder
    visual_projection.weight            from its vector to the one that texts are compared with, where there is such

What comes out is the vector that the whole model compares: transformers' `get_image_features`, not yet scaled to length
one.  Read so, nothing of the text tower is touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from roundexport.errors import CheckpointError

PROJECTION = "visual_projection."
_OWN = ("vision_model.", PROJECTION)


def has_towers(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an image encoder and a text encoder side by side."""
    architectures = config.get("architectures") or [""]
    named = str(architectures[0]) if isinstance(architectures, list) else ""
    nested = (config.get("vision_config"), config.get("text_config"))
    return named.endswith("Model") and all(isinstance(one, Mapping) for one in nested)


def vision_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the image encoder: the nested values."""
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
    found = {name: name for name in stored if name.startswith(_OWN)}
    if not found:
        raise CheckpointError(f"{where}: no tensor of an image encoder is among the weights ({', '.join(_OWN)})")
    return found
