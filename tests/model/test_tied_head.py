"""One rule for lm_head, held against transformers itself: tied, untied, copied, missing, by flag and by default."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from roundexport.errors import CheckpointError
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.streamed_model import StreamedModel
from roundexport.model.tied_head import _UNTIED_BY_DEFAULT, wants_tied
from roundexport.targets.export import export

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def make(models: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A toy whose config has this flag (None: no such key) and whose file has this head (other, copy or none)."""

    def build(family: str, flag: bool | None, head: str) -> Path:
        folder = Path(shutil.copytree(models(family), tmp_path / "model"))
        config = json.loads((folder / "config.json").read_text())
        config.pop("tie_word_embeddings", None)
        config.update({} if flag is None else {"tie_word_embeddings": flag})
        (folder / "config.json").write_text(json.dumps(config))
        tensors = load_file(folder / "model.safetensors")
        tensors.pop(HEAD, None)
        if head != "none":
            tensors[HEAD] = tensors[TABLE] + (np.roll(tensors[TABLE], 1, 0) if head == "other" else 0)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return build


CASES = [  # family, flag, head in the file -> tied
    ("qwen3", True, "none", True),
    ("qwen3", True, "copy", True),
    ("qwen3", True, "other", False),
    ("llama", False, "other", False),
    ("llama", False, "copy", False),
    ("llama", None, "other", False),  # LlamaConfig is untied by default
    ("gemma3", None, "none", True),  # Gemma3TextConfig is tied by default
    ("gemma3", None, "copy", True),
    ("gemma3", None, "other", False),
]


@pytest.mark.parametrize(("family", "flag", "head", "tied"), CASES)
def test_checkpoint_skeleton_and_transformers_agree(
    make: Callable[..., Path], family: str, flag: bool | None, head: str, tied: bool
) -> None:
    checkpoint = Checkpoint.open(make(family, flag, head))
    assert checkpoint.tied == tied
    assert (HEAD in checkpoint.owned()) == (not tied)
    reference: Any = checkpoint.load_model()
    assert (reference.lm_head.weight is reference.model.embed_tokens.weight) == tied
    assert np.array_equal(checkpoint.float32(HEAD), reference.lm_head.weight.detach().numpy())
    skeleton: Any = StreamedModel(checkpoint).model
    assert (skeleton.lm_head.weight is skeleton.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("target", ["onnx", "openvino"])
@pytest.mark.parametrize("head", ["other", "copy"])
def test_a_package_has_the_head_that_transformers_has(
    make: Callable[..., Path], tmp_path: Path, head: str, target: str
) -> None:
    from roundexport.runtime import load

    folder = make("qwen3, one block", True, head)
    export(folder, tmp_path / "package", to=target)
    ids = np.arange(12, dtype=np.int64)[None] + 20
    found = load(tmp_path / "package", precise=True).logits(ids)  # type: ignore[union-attr]
    with torch.no_grad():
        expected = Checkpoint.open(folder).load_model()(input_ids=torch.from_numpy(ids)).logits.numpy()
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_an_untied_head_that_is_missing_is_refused(make: Callable[..., Path], family: str) -> None:
    with pytest.raises(CheckpointError, match=r"lack lm_head\.weight, and config.json says tie_word_embeddings false"):
        Checkpoint.open(make(family, False, "none"))


def test_a_head_that_the_class_does_not_tie_and_the_file_lacks_is_refused(make: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"by its model's default means tie_word_embeddings false"):
        Checkpoint.open(make("llama", None, "none"))


def test_a_nested_flag_that_contradicts_is_refused() -> None:
    assert wants_tied({"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": True})
    with pytest.raises(CheckpointError, match="tie_word_embeddings True and, inside text_config, False"):
        wants_tied({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}})


def test_defaults_are_those_of_transformers() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    wrong = []
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            default = getattr(CONFIG_MAPPING[kind](), "tie_word_embeddings", None)
        except Exception:  # a type that cannot be made without values
            continue
        if default is not None and (default is False) != (kind in _UNTIED_BY_DEFAULT):
            wrong.append(kind)
    assert not wrong
