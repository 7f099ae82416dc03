"""Toys shaped like SmolVLM, Idefics3, LLaVA and Qwen-VL, and transformers' own processors and models of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoint_tools import spread_weights

from roundexport.formats.artifact import Artifact

EDGE, FEATURES = 32, 4
_SPECIAL = [
    "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>",
    "<|vision_start|>", "<|image_pad|>", "<|vision_end|>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)), "<|video_pad|>",
]  # fmt: skip
_TEXT: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 417, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": EDGE,
    "patch_size": 8,
}  # fmt: skip
_CLIP = {**_VISION, "model_type": "clip_vision_model", "num_hidden_layers": 2, "projection_dim": 32}
_LANGUAGE = "text_model", "language_model"
_GRID = {
    "depth": 3, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
    "out_hidden_size": 64,
}  # fmt: skip
_WHOLE = {**_GRID, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
_WINDOWS = {**_GRID, "intermediate_size": 64, "window_size": 16, "fullatt_block_indexes": [1]}
_DEEP = {**_GRID, "intermediate_size": 128, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
_GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# family -> (its word in transformers' classes, vision_config, what the config adds)
IMAGE = dict.fromkeys(_GRIDS, "<|image_pad|>")
_FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "smolvlm": ("SmolVLM", _VISION, {"scale_factor": 2}),
    "idefics3": ("Idefics3", _VISION, {"scale_factor": 2}),
    "llava": ("Llava", _CLIP, {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}),
    "qwen2_vl": ("Qwen2VL", _WHOLE, {}),
    "qwen2_5_vl": ("Qwen2_5_VL", _WINDOWS, {}),
    "qwen3_vl": ("Qwen3VL", _DEEP, {}),
}
_AXES = {"qwen2_vl": [2, 3, 3], "qwen2_5_vl": [2, 3, 3], "qwen3_vl": [4, 2, 2]}
_BYTES = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
_SPREAD = {"image_mean": [0.5, 0.4, 0.5], "image_std": [0.5, 0.5, 0.4]}
PREPARED: dict[str, dict[str, Any]] = {
    "smolvlm": {
        **_BYTES, **_SPREAD, "do_image_splitting": True, "do_pad": True, "size": {"longest_edge": 2 * EDGE},
        "max_image_size": {"longest_edge": EDGE}, "resample": 1,
    },
    "llava": {
        **_BYTES, **_SPREAD, "size": {"shortest_edge": EDGE}, "do_center_crop": True,
        "crop_size": {"height": EDGE, "width": EDGE}, "resample": 3,
    },
}  # fmt: skip
PREPARED["idefics3"] = PREPARED["smolvlm"]
PREPARED |= {
    family: {
        **_BYTES, **_SPREAD, "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "resample": 3,
        "size": {"shortest_edge": 16 * 16, "longest_edge": 48 * 48},
    }
    for family in _GRIDS
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def build_sight_model(folder: Path, family: str = "smolvlm") -> Path:
    """Write the toy, with tokenizer, preprocessor and chat template."""
    import transformers

    from conftest import _tokenizer

    torch.manual_seed(11)
    _tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": _SPECIAL})
    tokenizer.save_pretrained(folder)
    image = tokenizer.convert_tokens_to_ids(IMAGE.get(family, "<image>"))
    name, vision, more = _FAMILIES[family]
    text = _TEXT
    if family in _GRIDS:
        axes = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": _AXES[family]}
        text = {**_TEXT, "model_type": f"{family}_text", "rope_parameters": axes}
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=vision, image_token_id=image, tie_word_embeddings=True, **more
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    spread_weights(model)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPARED[family]))
    template = TEMPLATE
    if family in _GRIDS:
        template = template.replace("<image>", f"<|vision_start|>{IMAGE[family]}<|vision_end|>")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return folder


def processor(folder: Path, family: str = "smolvlm") -> Any:
    """transformers' processor of the toy; of SmolVLM that of Idefics3, which is the same but for videos."""
    from transformers import AutoTokenizer, Idefics3Processor, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer, prepared = AutoTokenizer.from_pretrained(folder), PREPARED[family]
    if family == "llava":
        own = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return LlavaProcessor(CLIPImageProcessorPil(**prepared), tokenizer, chat_template=TEMPLATE, **own)
    own = {"image_seq_len": FEATURES, "chat_template": TEMPLATE}
    return Idefics3Processor(Idefics3ImageProcessorPil(**prepared), tokenizer, **own)


@torch.no_grad()
def dequantized(folder: Path, *artifacts: Path, family: str = "smolvlm") -> Any:
    """transformers' whole model, with the weights of artifacts of its parts."""
    import transformers

    name = f"{_FAMILIES[family][0]}ForConditionalGeneration"
    model = getattr(transformers, name).from_pretrained(folder).eval()
    modules = dict(model.named_modules())
    for path in artifacts:
        artifact = Artifact.open(path)
        for layer in artifact.names():
            for module in (layer, *artifact.entry(layer).info.shared_with):
                names = (module, *(module.replace("model.", f"model.{part}.", 1) for part in _LANGUAGE))
                found = next(one for one in names if one in modules)
                modules[found].weight.copy_(torch.from_numpy(artifact.linear(layer).dequantize()))
    return model


def picture(height: int, width: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A picture of soft blocks of color."""
    from PIL import Image

    blocks = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(blocks).resize((width, height), 3))
