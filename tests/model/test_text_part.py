"""The language model of vision-language checkpoints: whatever its tensors are called in the file, and no other part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tools import spread_weights
from safetensors.torch import load_file, save_file

from roundexport.errors import CheckpointError, UsageError
from roundexport.graph.capture import capture
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.streamed_model import StreamedModel

TEXT: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 3,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "depth": 1, "num_heads": 2, "out_hidden_size": 64, "embed_dim": 32,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
WINDOWS = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 32}
# family -> (its words in the names of transformers' classes, what text_config adds, what vision_config adds)
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("Gemma3", WINDOWS, {}),
    "qwen2.5-vl": ("Qwen2_5_VL", MROPE, {}),
    "qwen3-vl": ("Qwen3VL", MROPE, {"deepstack_visual_indexes": [0]}),
    "mistral3": ("Mistral3", {"model_type": "mistral"}, {"model_type": "pixtral"}),
    "smolvlm": ("SmolVLM", {"model_type": "llama"}, {}),
}


def build(family: str, folder: Path) -> torch.nn.Module:
    import transformers

    name, text, vision = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(text_config={**TEXT, **text}, vision_config={**VISION, **vision})
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    spread_weights(model)
    model.save_pretrained(folder)
    return model  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_gives_what_the_whole_model_gives_on_text(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, ids = build(family, tmp_path), torch.arange(4, 64).view(2, 30)
    expected = whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.part == "text" and checkpoint.task == "generate"
    assert "--part text" in checkpoint.notes[0]
    assert all(
        name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head."))
        for name in checkpoint.names()
    )
    loaded = checkpoint.load_model()
    assert torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-5)
    read: set[str] = set()
    float32 = Checkpoint.float32
    monkeypatch.setattr(
        Checkpoint,
        "float32",
        lambda self, name, *rest, **more: (read.add(self._names[name]), float32(self, name, *rest, **more))[1],
    )
    streamed = StreamedModel(checkpoint)
    assert streamed.streamed
    with streamed.tables(ids), streamed.streamed_forward() as model:
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)
    assert len(read) == len(checkpoint.owned()) and not any("visi" in name or "connector" in name for name in read)
    got = capture(checkpoint)
    assert len(got.attentions) == 2 and len(got.rope_table_of) == 4 and got.notes[0] == checkpoint.notes[0]


@pytest.mark.parametrize("inside", ["language_model.model.", "model.language_model.", "model.text_model.", "model."])
def test_names_of_older_files(inside: str, tmp_path: Path) -> None:
    build("smolvlm", tmp_path)
    expected = {name: Checkpoint.open(tmp_path).float32(name) for name in Checkpoint.open(tmp_path).names()}
    file, head = tmp_path / "model.safetensors", "language_model." if inside.startswith("language") else ""
    tensors = load_file(file)
    renamed = {
        name.replace("model.text_model.", inside).replace("lm_head", f"{head}lm_head"): tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, file, {"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.names() == sorted(expected)
    assert all((checkpoint.float32(name) == values).all() for name, values in expected.items())
    loaded = checkpoint.load_model().state_dict()
    assert all((loaded[name].numpy() == values).all() for name, values in expected.items())


def test_flat_values_beside_a_vision_config_are_the_decoders(tmp_path: Path) -> None:
    build("qwen2.5-vl", tmp_path)
    nested = Checkpoint.open(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    text = {key: value for key, value in config.pop("text_config").items() if key not in ("model_type", "dtype")}
    (tmp_path / "config.json").write_text(json.dumps({**text, **config}))
    flat = Checkpoint.open(tmp_path)
    assert flat.names() == nested.names() and flat.config["hidden_size"] == 64 and "vision_config" not in flat.config
    assert len(capture(flat, whole=False).attentions) >= 1


def test_a_name_that_is_there_twice_and_none_at_all_are_refused(tmp_path: Path) -> None:
    build("smolvlm", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.norm.weight": tensors["model.text_model.norm.weight"].clone()}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"both mean model\.norm\.weight"):
        Checkpoint.open(tmp_path)
    save_file({f"tower.{name}": tensor for name, tensor in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="no tensor of a language model"):
        Checkpoint.open(tmp_path)


def test_parts_are_taken_by_name(tmp_path: Path) -> None:
    build("smolvlm", tmp_path)
    assert Checkpoint.open(tmp_path, part="text").part == "text"
    assert Checkpoint.open(tmp_path, part="vision").part == "vision"
    with pytest.raises(UsageError, match=r"part 'sound' is not known; parts are text, vision"):
        Checkpoint.open(tmp_path, part="sound")
