"""Models with an encoder and a decoder: what they are for, what their tables share, what their files leave out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import PAIRS, build_model
from roundexport.errors import CheckpointError, UnsupportedError
from roundexport.model.blocks import find_stack, tied_modules
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.encoder_decoder import task_of_pair
from roundexport.model.skeleton import build_skeleton
from roundexport.model.streamed_model import StreamedModel

EVERY = ("encoder.embed_tokens", "decoder.embed_tokens")


@pytest.mark.parametrize("family", PAIRS)
def test_every_parameter_is_what_transformers_loads(models: Callable[[str], Path], family: str) -> None:
    checkpoint = Checkpoint.open(models(family))
    assert checkpoint.task == ("transcribe" if family == "whisper" else "translate")
    model: Any = checkpoint.load_model()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert np.array_equal(checkpoint.float32(name), parameter.detach().numpy()), name
    skeleton = build_skeleton(checkpoint)
    assert tied_modules(skeleton) == tied_modules(model)
    stack = find_stack(skeleton)
    assert [part.start for part in stack.parts] == [0, 2] and len(stack.blocks) == 4
    assert stack.block_name(1).endswith(("encoder.layers.1", "encoder.block.1"))
    assert stack.block_name(2).endswith(("decoder.layers.0", "decoder.block.0"))
    if family != "whisper":  # Marian's table is another module than the first one with its weight
        table = model.get_encoder().get_input_embeddings().weight
        assert torch.equal(StreamedModel(checkpoint).token_rows(torch.tensor([2, 5])), table[[2, 5]])


def test_an_encoder_of_two_halves_is_read_alone(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Sentence-T5 and GTR name T5EncoderModel, and say is_encoder_decoder; some files hold the decoder as well."""
    shutil.copytree(models("t5"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["is_encoder_decoder"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["T5EncoderModel"]}))
    checkpoint = Checkpoint.open(tmp_path)
    model: Any = checkpoint.load_model()
    assert checkpoint.task == "embed" and type(model).__name__ == "T5EncoderModel"
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert np.array_equal(checkpoint.float32(name), parameter.detach().numpy()), name
    skeleton = build_skeleton(checkpoint)
    assert tied_modules(skeleton) == tied_modules(model) == [("shared", "encoder.embed_tokens")]
    assert len(find_stack(skeleton).blocks) == 2


def test_tables_of_their_own_stay_apart(models: Callable[[str], Path], tmp_path: Path) -> None:
    build_model("bart", tmp_path, tie_word_embeddings=False, encoder_layers=1, decoder_layers=1)
    assert not tied_modules(build_skeleton(Checkpoint.open(tmp_path)))
    tied = {group for group in tied_modules(build_skeleton(Checkpoint.open(models("bart"))))}
    assert tied == {("model.shared", *(f"model.{name}" for name in EVERY), "lm_head")}


def test_a_lost_head_is_told(tmp_path: Path) -> None:
    build_model("bart", tmp_path, encoder_layers=1, decoder_layers=1)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"lack lm_head\.weight"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["BartForSequenceClassification"]}, "does not answer in tokens"),
        ({"architectures": ["VisionEncoderDecoderModel"]}, "does not answer in tokens"),
        ({"architectures": ["Florence2ForConditionalGeneration"], "vision_config": {}}, "reads more than token ids"),
    ],
)
def test_others_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        task_of_pair(config, Path("folder"))
