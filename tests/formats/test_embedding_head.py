"""Modules behind an embedder: what is refused, by name; values are held in targets/test_sentence_transformers.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from roundexport.errors import ArtifactError, UnsupportedError
from roundexport.formats.embedding_head import module_files, read_head
from roundexport.storage.paths import ListedFiles

WIDTH = 8


def test_what_cannot_be_reproduced_is_refused_by_name(tmp_path: Path) -> None:
    def folder(name: str, *modules: tuple[str, dict[str, Any]]) -> ListedFiles:
        (tmp_path / name).mkdir()
        kinds = [("Transformer", ""), *((kind, f"{place}_{kind}") for place, (kind, _) in enumerate(modules, 1))]
        (tmp_path / name / "modules.json").write_text(json.dumps([{"type": k, "path": p} for k, p in kinds]))
        for place, (kind, config) in enumerate(modules, 1):
            (tmp_path / name / f"{place}_{kind}").mkdir()
            (tmp_path / name / f"{place}_{kind}" / "config.json").write_text(json.dumps(config))
        return ListedFiles(tmp_path / name)

    mean: tuple[str, dict[str, Any]] = ("Pooling", {"pooling_mode": "mean"})
    rows = [
        (folder("a", mean, ("LSTM", {})), UnsupportedError, "module LSTM in place 3"),
        (folder("b", ("Normalize", {}), mean), UnsupportedError, "module Normalize in place 2"),
        (folder("c", mean, ("Dense", {"activation_function": "x.Snake"})), UnsupportedError, "activation Snake"),
        (folder("d", mean, ("Dense", {"module_input_name": "tokens"})), UnsupportedError, "works on 'tokens'"),
        (folder("e", mean, ("Dense", {})), ArtifactError, "model.safetensors is needed"),
        (folder("f", ("Pooling", {"pooling_mode": "mean", "embedding_dimension": 9})), ArtifactError, "vectors of 9"),
    ]
    for files, kind, words in rows:
        with pytest.raises(kind, match=words):
            read_head(files, WIDTH)
    (tmp_path / "e" / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedError, match="are a pickle"):
        read_head(ListedFiles(tmp_path / "e"), WIDTH)


def test_widths_are_held_against_each_other(tmp_path: Path) -> None:
    kinds = [("Transformer", ""), ("Pooling", "1"), ("Dense", "2")]
    (tmp_path / "modules.json").write_text(json.dumps([{"type": kind, "path": path} for kind, path in kinds]))
    for place, config in (("1", {"pooling_mode": ["mean", "cls"]}), ("2", {"bias": False})):
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.json").write_text(json.dumps(config))
    save_file({"linear.weight": np.ones((5, 2 * WIDTH), np.float32)}, tmp_path / "2" / "model.safetensors")
    head = read_head(ListedFiles(tmp_path), WIDTH)
    assert head.width(WIDTH) == 5 and head.pooling == {"mode": "modules", "normalize": False}
    assert set(module_files(ListedFiles(tmp_path))) == {"1/config.json", "2/config.json", "2/model.safetensors"}
    with pytest.raises(ArtifactError, match="takes vectors of 16, and gets 18"):
        read_head(ListedFiles(tmp_path), WIDTH + 1)
