"""Weights over several files: the index names them all, and the checkpoint's reader reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from roundexport.storage.sharded_writer import ShardedWriter


def test_files_are_cut_at_the_limit_and_indexed(tmp_path: Path) -> None:
    values = {name: np.full((4, 4), number, np.float32) for number, name in enumerate("abcde")}
    writer = ShardedWriter(tmp_path, {name: ("F32", (4, 4)) for name in values}, limit=130)
    for name in reversed(values):
        writer.write(name, values[name])
    writer.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 5 * 64}
    files = [f"model-{number:05}-of-00003.safetensors" for number in (1, 1, 2, 2, 3)]
    assert index["weight_map"] == dict(zip("abcde", files, strict=True))
    for name, file in index["weight_map"].items():
        assert np.array_equal(load_file(tmp_path / file)[name], values[name])


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    writer = ShardedWriter(tmp_path, {"a": ("F32", (2,))}, limit=1)
    writer.write("a", np.ones(2, np.float32))
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
