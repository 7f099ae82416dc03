"""Checkpoints of vision-language models with random weights: sizes, words and processor, for random_checkpoint.py.

    smolvlm-256m    SmolVLM-256M: SmolLM2-135M with a head of its own, SigLIP at 512 x 512, tiles, pixel shuffle 4
    qwen3-vl-2b     Qwen3-VL-2B: 28 blocks of 2048, a tower of 24 blocks of 1024, DeepStack behind three of these
    qwen2.5-vl-3b   Qwen2.5-VL-3B: 36 blocks of 2048, a tower of 32 blocks of 1280 with windows

Sizes are those of config.json.  Names of tensors are asked of transformers' class on the meta device.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BYTES = {
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
}
_HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_TILES = [
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
]
_MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}END\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True)
class PictureShape:
    """A vision-language model by its sizes.

    Args:
        architecture: transformers' class.
        model_type: of config.json.
        text: its text_config.
        vision: its vision_config.
        depth: what the vision_config calls the number of its blocks.
        listed: names in the vision_config of lists of its blocks.
        image: the word that stands for a row of a picture.
        words: that the tokenizer gets.
        template: what the chat template writes for a picture, and at the end of a turn.
        prepared: preprocessor_config.json.
        processor: transformers' class that it names.
        more: further values of config.json.
    """

    architecture: str
    model_type: str
    text: dict[str, Any]
    vision: dict[str, Any]
    depth: str
    listed: tuple[str, ...]
    image: str
    words: list[str]
    template: tuple[str, str]
    prepared: dict[str, Any]
    processor: str
    more: dict[str, Any]


_QWEN = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
}
_QWEN_MARKED = ("<|vision_start|><|image_pad|><|vision_end|>", "<|im_end|>")
SHAPES = {
    "smolvlm-256m": PictureShape(
        architecture="SmolVLMForConditionalGeneration",
        model_type="smolvlm",
        text={
            "model_type": "llama",
            "vocab_size": 49280,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100000.0,
        },
        vision={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
        },
        depth="num_hidden_layers",
        listed=(),
        image="<image>",
        words=_TILES,
        template=("<image>", "<end_of_utterance>"),
        prepared={
            **_BYTES,
            **_HALVES,
            "do_image_splitting": True,
            "do_pad": True,
            "resample": 1,
            "size": {"longest_edge": 2048},
            "max_image_size": {"longest_edge": 512},
            "image_processor_type": "SmolVLMImageProcessor",
        },
        processor="SmolVLMProcessor",
        more={"scale_factor": 4, "tie_word_embeddings": False},
    ),
    "qwen3-vl-2b": PictureShape(
        architecture="Qwen3VLForConditionalGeneration",
        model_type="qwen3_vl",
        text={
            **_QWEN,
            "model_type": "qwen3_vl_text",
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_theta": 5e6,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
        },
        vision={
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": 2048,
            "patch_size": 16,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        depth="depth",
        listed=("deepstack_visual_indexes",),
        image="<|image_pad|>",
        words=_MARKS,
        template=_QWEN_MARKED,
        prepared={
            **_BYTES,
            **_HALVES,
            "resample": 3,
            "patch_size": 16,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "size": {"shortest_edge": 65536, "longest_edge": 16777216},
            "image_processor_type": "Qwen2VLImageProcessorFast",
        },
        processor="Qwen3VLProcessor",
        more={},
    ),
    "qwen2.5-vl-3b": PictureShape(
        architecture="Qwen2_5_VLForConditionalGeneration",
        model_type="qwen2_5_vl",
        text={
            **_QWEN,
            "model_type": "qwen2_5_vl_text",
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_key_value_heads": 2,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24]},
        },
        vision={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        depth="depth",
        listed=("fullatt_block_indexes",),
        image="<|image_pad|>",
        words=_MARKS,
        template=_QWEN_MARKED,
        prepared={
            **_BYTES,
            **_CLIP,
            "resample": 3,
            "patch_size": 14,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "size": {"shortest_edge": 3136, "longest_edge": 12845056},
            "image_processor_type": "Qwen2VLImageProcessorFast",
        },
        processor="Qwen2_5_VLProcessor",
        more={},
    ),
}


def write_side_files(folder: Path, shape: PictureShape, blocks: int | None) -> None:
    """Everything but weights; the folder has a tokenizer already, which gets the model's words.

    Args:
        folder: of the checkpoint.
        shape: what is written.
        blocks: of the text model and of the tower, where they are fewer than the shape has; None: all.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": shape.words})
    tokenizer.chat_template = _TEMPLATE.replace("IMAGE", shape.template[0]).replace("END", shape.template[1])
    tokenizer.save_pretrained(folder)
    numbers = {"eos_token_id": tokenizer.convert_tokens_to_ids(shape.template[1])}
    numbers |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text, vision = {**shape.text, **numbers}, dict(shape.vision)
    if blocks is not None:
        text["num_hidden_layers"], all_blocks = min(blocks, text["num_hidden_layers"]), vision[shape.depth]
        vision[shape.depth] = count = min(blocks, all_blocks)
        for name in shape.listed:  # as far up in the shorter tower
            vision[name] = sorted({max(0, (place + 1) * count // all_blocks - 1) for place in vision[name]})
    config = {
        "tie_word_embeddings": True,
        **shape.more,
        **numbers,
        "architectures": [shape.architecture],
        "model_type": shape.model_type,
        "image_token_id": tokenizer.convert_tokens_to_ids(shape.image),
        "text_config": text,
        "vision_config": vision,
        "dtype": "bfloat16",
    }
    if "<|video_pad|>" in shape.words:
        for name, word in (("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end")):
            config[f"{name}_token_id"] = tokenizer.convert_tokens_to_ids(f"<|{word}|>")
    prepared = {**shape.prepared, "processor_class": shape.processor}
    for name, values in (("config", config), ("preprocessor_config", prepared)):
        (folder / f"{name}.json").write_text(json.dumps(values, indent=2))


def tensor_groups(folder: Path) -> Iterator[dict[str, tuple[int, ...]]]:
    """Shapes by name, a file's worth each: the tables and what is between blocks, then every block."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():  # a tied one is listed once
        words = name.split(".")
        place = next((at for at, word in enumerate(words) if word.isdigit()), 0)
        groups.setdefault(".".join(words[: place + 1]) if place else "", {})[name] = tuple(parameter.shape)
    yield from groups.values()
