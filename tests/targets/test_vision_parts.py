"""The image side of vision-language models: tower and projector give what transformers' own class gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_tools import spread_weights

from conftest import tuned
from roundexport import export, verify
from roundexport.errors import UnsupportedError
from roundexport.model.checkpoint import Checkpoint
from roundexport.runtime import ImageEncoder, load

TEXT: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 3,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
# family -> (its word in transformers' classes, what the config adds, what text_config adds)
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "smolvlm": ("SmolVLM", {"scale_factor": 2, "image_token_id": 7}, {"model_type": "llama"}),
    "idefics3": ("Idefics3", {"scale_factor": 2, "image_token_id": 7}, {"model_type": "llama"}),
    "gemma3": ("Gemma3", {"mm_tokens_per_image": 4, "image_token_index": 7}, {}),
}


def build(family: str, folder: Path) -> Any:
    import transformers

    name, whole, text = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(text_config={**TEXT, **text}, vision_config=VISION, **whole)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    spread_weights(model)
    model.save_pretrained(folder)
    prepared = {
        "do_image_splitting": True,
        "size": {"longest_edge": 64},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    if family != "gemma3":
        (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
    return model


@pytest.mark.parametrize(("family", "target"), [("smolvlm", "onnx"), ("idefics3", "openvino"), ("gemma3", "onnx")])
def test_features_are_those_of_transformers(family: str, target: str, tmp_path: Path) -> None:
    whole = build(family, tmp_path / "model")
    artifact = tuned(tmp_path / "model", tmp_path / "artifact", algorithm="rtn", bits=8, group_size=32, part="vision")
    export(artifact, tmp_path / "package", to=target, progress=False)
    checkpoint = Checkpoint.open(tmp_path / "model", part="vision")
    assert not any("text_model" in name or "language_model" in name for name in checkpoint.names())
    package = load(tmp_path / "package", precise=True)
    assert isinstance(package, ImageEncoder) and len(package.manifest.layers) == 12
    pixels = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    given = torch.from_numpy(pixels)
    with torch.no_grad():
        wanted = whole.get_image_features(pixel_values=given if family == "gemma3" else given[None]).pooler_output
        own = checkpoint.load_model()(pixel_values=given).last_hidden_state
    wanted = torch.stack(list(wanted)).reshape(own.shape).numpy()
    assert np.abs(own.numpy() - wanted).max() < 1e-5 * wanted.std()
    assert np.abs(package.hidden(pixels) - wanted).max() < 0.1 * wanted.std()  # 8 bits
    report: Any = verify(tmp_path / "package", against=tmp_path / "model", num_samples=4, progress=False)
    assert report.quality.cosine.mean > 0.99


def test_an_image_side_of_another_kind_is_refused(tmp_path: Path) -> None:
    import transformers

    vision = {**VISION, "model_type": "clip_vision_model"}
    config = transformers.LlavaNextConfig(text_config={**TEXT, "model_type": "llama"}, vision_config=vision)
    transformers.LlavaNextForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedError, match="its image side is not a tower"):
        tuned(tmp_path / "model", tmp_path / "artifact", algorithm="rtn", part="vision")
