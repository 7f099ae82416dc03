"""A toy that reads pictures, shaped like SmolVLM, and transformers' own processor and model of it."""

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
    *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)),
]  # fmt: skip
_TEXT: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 416, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": EDGE,
    "patch_size": 8,
}  # fmt: skip
_PREPARED = {
    "do_image_splitting": True, "do_pad": True, "do_resize": True, "do_rescale": True, "do_normalize": True,
    "size": {"longest_edge": 2 * EDGE}, "max_image_size": {"longest_edge": EDGE}, "resample": 1,
    "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def build_sight_model(folder: Path) -> Path:
    """Write the toy, with tokenizer, preprocessor and chat template."""
    import transformers

    from conftest import _tokenizer

    torch.manual_seed(11)
    _tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": _SPECIAL})
    tokenizer.save_pretrained(folder)
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.SmolVLMConfig(
        text_config=_TEXT, vision_config=_VISION, scale_factor=2, image_token_id=image, tie_word_embeddings=True
    )
    model = transformers.SmolVLMForConditionalGeneration(config).eval()
    spread_weights(model)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PREPARED))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


def processor(folder: Path) -> Any:
    """transformers' processor of the toy; that of Idefics3, which SmolVLM's is with videos left out."""
    from transformers import AutoTokenizer, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prepared = Idefics3ImageProcessorPil(**_PREPARED)
    return Idefics3Processor(prepared, tokenizer, image_seq_len=FEATURES, chat_template=TEMPLATE)


@torch.no_grad()
def dequantized(folder: Path, *artifacts: Path) -> Any:
    """transformers' whole model, with the weights of artifacts of its parts."""
    import transformers

    model = transformers.SmolVLMForConditionalGeneration.from_pretrained(folder).eval()
    modules = dict(model.named_modules())
    for path in artifacts:
        artifact = Artifact.open(path)
        for name in artifact.names():
            for module in (name, *artifact.entry(name).info.shared_with):
                found = next(
                    one for one in (module, module.replace("model.", "model.text_model.", 1)) if one in modules
                )
                modules[found].weight.copy_(torch.from_numpy(artifact.linear(name).dequantize()))
    return model


def picture(height: int, width: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A picture of soft blocks of color."""
    from PIL import Image

    blocks = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(blocks).resize((width, height), 3))
