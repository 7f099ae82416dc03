"""What a checkpoint is known by, the files beside its weights, and the pooling that they declare."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from roundexport.errors import CheckpointError, UnsupportedError
from roundexport.model.checkpoint import Checkpoint


def test_the_digest_is_the_identity_of_config_and_weights(models: Callable[[str], Path], tmp_path: Path) -> None:
    original = Checkpoint.open(models("llama"))
    folder = Path(shutil.copytree(models("llama"), tmp_path / "copy"))
    assert Checkpoint.open(folder).digest == original.digest
    assert set(original.files()) == {"config.json", "model.safetensors"}
    (folder / "tokenizer_config.json").write_text("{}")
    assert Checkpoint.open(folder).digest == original.digest
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    assert Checkpoint.open(folder).digest != original.digest


def test_side_files_keep_their_sub_folders(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = _sentence_transformer(models("bert"), tmp_path, {"pooling_mode_cls_token": True})
    names = Checkpoint.open(folder).copy_side_files(tmp_path / "out")
    assert "1_Pooling/config.json" in names
    assert "model.safetensors" not in names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_a_side_file_that_links_out_of_the_folder_is_refused(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models("llama"), tmp_path / "m"))
    (tmp_path / "secret").write_text("s")
    (folder / "vocab.txt").symlink_to("../secret")
    with pytest.raises(CheckpointError, match=r"vocab\.txt is a link that leaves the folder"):
        Checkpoint.open(folder).copy_side_files(tmp_path / "out")


def _sentence_transformer(model: Path, tmp_path: Path, pooling: dict[str, Any], last: str = "Normalize") -> Path:
    folder = Path(shutil.copytree(model, tmp_path / "st"))
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), (last, "2_Last")]
    (folder / "modules.json").write_text(
        json.dumps(
            [{"idx": i, "type": f"sentence_transformers.models.{t}", "path": p} for i, (t, p) in enumerate(modules)]
        )
    )
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_cls_token": True, "include_prompt": True}, "cls"),
        ({"pooling_mode_lasttoken": True, "word_embedding_dimension": 64}, "last"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len"),
        ({"pooling_mode": "mean_sqrt_len_tokens"}, "mean_sqrt_len"),
        ({"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        ({"pooling_mode": ["weightedmean"]}, "weightedmean"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_pooling(models: Callable[[str], Path], tmp_path: Path, config: dict[str, Any], mode: str) -> None:
    folder = _sentence_transformer(models("bert"), tmp_path, config)
    assert Checkpoint.open(folder).pooling() == {"mode": mode, "normalize": True}


def test_without_sentence_transformers_files_the_mean_is_taken(models: Callable[[str], Path]) -> None:
    assert Checkpoint.open(models("bert")).pooling() == {"mode": "mean", "normalize": False}


@pytest.mark.parametrize(
    ("config", "last", "message"),
    [
        ({"pooling_mode": "median"}, "Normalize", "pooling by median is not supported"),
        ({"pooling_mode": "cls", "include_prompt": False}, "Normalize", "without the prompt"),
        ({}, "Normalize", "pooling by nothing is not supported"),
        ({"pooling_mode_mean_tokens": True}, "LSTM", "the sentence-transformers module LSTM in place 3 is not"),
    ],
)
def test_pooling_that_packages_cannot_do_is_refused(
    models: Callable[[str], Path], tmp_path: Path, config: dict[str, Any], last: str, message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        Checkpoint.open(_sentence_transformer(models("bert"), tmp_path, config, last))
