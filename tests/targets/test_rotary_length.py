"""A package of a model whose rotary angles change with the length: right on its own runtime, and the user is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from onnx_support import Decoder, session
from openvino_tools import EXACT, run_steps

from conftest import build_model
from roundexport.model.checkpoint import Checkpoint
from roundexport.targets.export import export

LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
    "short_factor": [1 + 0.01 * i for i in range(8)], "long_factor": [1 + 0.3 * i for i in range(8)],
}  # fmt: skip


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_longrope_below_the_original_length(target: str, tmp_path: Path) -> None:
    folder = build_model(
        "phi3", tmp_path / "m", max_position_embeddings=96, original_max_position_embeddings=32, rope_parameters=LONG,
        num_hidden_layers=1,
    )  # fmt: skip
    package, ids = tmp_path / "package", np.random.default_rng(0).integers(4, 384, (1, 24))
    report = export(folder, package, to=target)
    assert "max_context is 32" in report.notes[0]
    assert json.loads((package / "roundexport.json").read_text())["max_context"] == 32
    ones = np.ones_like(ids)
    if target == "onnx":
        decoder = Decoder(session(package, 0), 1)
        parts = [decoder.run(ids[:, :16], ones[:, :16])]
        parts += [decoder.run(ids[:, n : n + 1], ones[:, : n + 1]) for n in range(16, 24)]
        found = np.concatenate(parts, 1)
    else:
        compiled = ov.Core().compile_model(package / "openvino_model.xml", "CPU", EXACT)
        feed = {"input_ids": ids, "attention_mask": ones, "position_ids": np.arange(24)[None]}
        found = run_steps(compiled, feed, list(range(16, 24)))
    with torch.no_grad():
        expected = Checkpoint.open(folder).load_model()(input_ids=torch.tensor(ids)).logits.numpy()
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize(("family", "changes", "told"), [("phi3", {"partial_rotary_factor": 0.5}, 1), ("llama", {}, 0)])
def test_rotary_that_does_not_go_into_the_attention_is_said(
    family: str, changes: dict[str, float], told: int, tmp_path: Path
) -> None:
    model = build_model(family, tmp_path / "m", num_hidden_layers=1, **changes)
    report = export(model, tmp_path / "p", to="onnx", progress=False)
    assert [rule for rule, _ in report.refused].count("rotary in attention") == told
