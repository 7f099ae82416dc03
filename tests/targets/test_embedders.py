"""Decoders that are used as embedders: causal attention without a cache, padded on either side, on both runtimes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from onnx_support import session
from openvino_tools import EXACT, run_steps

from conftest import FAMILIES
from roundexport.model.checkpoint import Checkpoint
from roundexport.targets.export import export


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_qwen3_embedder(target: str, tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    model = Qwen3Model(Qwen3Config(**{**FAMILIES["qwen3"][2], "num_hidden_layers": 1, "initializer_range": 0.3})).eval()
    model.save_pretrained(tmp_path / "m")
    export(tmp_path / "m", tmp_path / "package", to=target)
    assert Checkpoint.open(tmp_path / "m").task == "embed"
    ids, mask = np.random.default_rng(0).integers(4, 384, (3, 12)), np.ones((3, 12), np.int64)
    mask[1, 8:], mask[2, :4] = 0, 0
    feed = {"input_ids": ids, "attention_mask": mask}
    if target == "onnx":
        found = session(tmp_path / "package", 0).run(None, feed)[0]
    else:
        compiled = ov.Core().compile_model(tmp_path / "package" / "openvino_model.xml", "CPU", EXACT)
        found = run_steps(compiled, feed, [])
    with torch.no_grad():
        expected = model(**{name: torch.tensor(values) for name, values in feed.items()}).last_hidden_state.numpy()
    assert np.abs(found - expected)[mask.astype(bool)].max() < 1e-4  # of values up to 4
