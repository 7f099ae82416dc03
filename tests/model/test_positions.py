"""A position table that begins behind the padding id: packages serve what the model can, and not one token more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ENCODER, _tokenizer
from roundexport.errors import UsageError
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.positions import max_positions, positions_of
from roundexport.targets.export import export

POSITIONS = 32
SHIFTED = ["roberta", "xlm-roberta", "camembert", "data2vec-text", "esm", "xlm-roberta-xl", "mpnet"]


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny RoBERTa with a table of two rows more than it has positions."""
    from transformers import RobertaConfig, RobertaModel

    folder = tmp_path_factory.mktemp("roberta")
    torch.manual_seed(3)
    values = {**ENCODER, "max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1, "num_hidden_layers": 1}
    model = RobertaModel(RobertaConfig(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    _tokenizer(folder)
    return folder


@pytest.mark.parametrize("family", SHIFTED)
def test_the_padding_offset_is_taken_off(family: str) -> None:
    assert positions_of({"model_type": family, "max_position_embeddings": 514, "pad_token_id": 1}) == 512
    assert positions_of({"model_type": family, "max_position_embeddings": 514}) == 512
    assert positions_of({"model_type": "bert", "max_position_embeddings": 512, "pad_token_id": 1}) == 512


def test_positions_that_the_file_does_not_name_are_the_class_own(models: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    checkpoint.config = {key: value for key, value in checkpoint.config.items() if key != "max_position_embeddings"}
    assert max_positions(checkpoint) == 512


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_a_package_is_right_up_to_its_last_position(roberta: Path, tmp_path: Path, target: str) -> None:
    from roundexport.runtime import load

    export(roberta, tmp_path / "package", to=target)
    engine = load(tmp_path / "package", precise=True)
    text = "a text that is longer than all positions of the model " * 4
    inputs = engine.encode([text])  # type: ignore[union-attr]
    assert inputs["input_ids"].shape == (1, POSITIONS)
    with torch.no_grad():
        model = Checkpoint.open(roberta).load_model()
        hidden = model(**{name: torch.from_numpy(array) for name, array in inputs.items()}).last_hidden_state.numpy()
    expected = engine.pool(hidden, inputs["attention_mask"])[0]  # type: ignore[union-attr]
    found = engine.embed([text])[0]  # type: ignore[union-attr]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    with pytest.raises(UsageError, match=f"beyond the {POSITIONS} positions of the model"):
        export(roberta, tmp_path / "longer", to=target, max_context=POSITIONS + 1)
