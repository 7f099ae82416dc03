"""What a vision-language model makes of an image before its language model reads it: tower, then projector.

    pixels [B, C, height, width] ─ tower ─ hidden states ─ projector ─ features [B, T, H of the language model]

The class is transformers' for the whole model, without its language model.  Its own `get_image_features` also counts
and splits images, which a graph cannot, so its two modules are called one after the other, as it does.

LLaVA takes the hidden states of an earlier layer, without the class's position: the layers behind it are left out.
Qwen-VL's tower is both in one, and reads pictures of any size: grid_tower.py.

Source: `get_image_features` of transformers 5.23's classes; held against it in tests/targets/test_vision_parts.py.
Limits: models other than LLaVA that name a layer do more with its hidden states (shuffle, pack), and are refused.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import MODEL_MAPPING, LlavaModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from roundexport.errors import UnsupportedError

from .grid_tower import GridTower, is_grid_tower

_TOWERS, _PROJECTORS = ("vision_tower", "vision_model"), ("multi_modal_projector", "connector")
_LANGUAGE = ("language_model", "text_model")


class ImageFeatures(PreTrainedModel):  # type: ignore[misc]
    """The image side of a vision-language model.

    Args:
        config: of the whole model.

    Attributes:
        model: transformers' model, without its language model.
        grid: what runs a tower that reads pictures of any size; None: it is another.

    Raises:
        UnsupportedError: it has no tower and projector of the kind above.
    """

    main_input_name = "pixel_values"
    base_model_prefix = "model"
    _supports_sdpa = _supports_attention_backend = True

    def __init__(self, config: Any) -> None:
        if type(config) not in MODEL_MAPPING:
            raise UnsupportedError(f"{type(config).__name__}: transformers has no model for it")
        layer = getattr(config, "vision_feature_layer", None)
        picks = False
        if MODEL_MAPPING[type(config)] is LlavaModel and isinstance(layer, int):
            picks = True
            layers = config.vision_config.num_hidden_layers
            config = _up_to(config, layer if layer >= 0 else layers + 1 + layer)
            left = "|".join(map(str, range(config.vision_config.num_hidden_layers, layers)))
            self._keys_to_ignore_on_load_unexpected = [rf"\.layers\.({left})\.", r"\.post_layernorm\."]
        super().__init__(config)
        self.model = MODEL_MAPPING[type(config)](config)
        self._first = int(picks and config.vision_feature_select_strategy == "default")
        for name in _LANGUAGE:
            if hasattr(self.model, name):
                setattr(self.model, name, nn.Identity())
        self.grid: GridTower | None = None
        if is_grid_tower(getattr(self.model, "visual", nn.Identity())):
            self.grid = GridTower(self.model.visual)
            self.post_init()
            return
        found = [self._child(names) for names in (_TOWERS, _PROJECTORS)]
        if None in found or (layer is not None and not picks):
            raise UnsupportedError(
                f"{type(self.model).__name__}: its image side is not a tower ({', '.join(_TOWERS)}) whose last hidden "
                f"states go through a projector ({', '.join(_PROJECTORS)}); it is not exported"
            )
        self._tower, self._projector = (str(name) for name in found)
        if picks and hasattr(self.model.get_submodule(self._tower), "post_layernorm"):
            self.model.get_submodule(self._tower).post_layernorm = nn.Identity()
        self.post_init()

    def _child(self, names: tuple[str, ...]) -> str | None:
        return next((name for name in names if hasattr(self.model, name)), None)

    def get_output_embeddings(self) -> None:
        """There are none."""

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        """Features [B, T, H]."""
        if self.grid is not None:
            return BaseModelOutput(last_hidden_state=self.grid(pixel_values))
        hidden = self.model.get_submodule(self._tower)(pixel_values=pixel_values).last_hidden_state
        hidden = hidden[:, self._first :] if self._first else hidden
        return BaseModelOutput(last_hidden_state=self.model.get_submodule(self._projector)(hidden))


def _up_to(config: Any, layers: int) -> Any:
    """A config whose tower has so many layers."""
    found = copy.deepcopy(config)
    found.vision_config.num_hidden_layers = layers
    return found
