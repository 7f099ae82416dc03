"""Exported GGUF files opened by transformers' own reader: the logits are those of the dequantized artifact.

transformers dequantizes every tensor and rebuilds config and row order from what the file says, so wrong metadata, rows
of q and k left in llama.cpp's order, or a head that is not the embedding would show here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from onnx_support import write_artifact

from conftest import build_model
from roundexport import export
from roundexport.formats.artifact import Artifact
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.dequantized_model import DequantizedModel
from roundexport.quant.spec import QuantSpec

pytest.importorskip("gguf")

FOUR, EIGHT = QuantSpec(4, 32), QuantSpec(8, 32)
LIMIT = 1e-5  # of the largest logit: the same float32 model, whose weights are equal bit for bit


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """Llama with a head of its own; Qwen3 with a tied one and heads of the width that transformers expects."""
    folder = tmp_path_factory.mktemp("toys")
    made = {
        False: build_model("llama", folder / "own", num_hidden_layers=1),
        True: build_model("qwen3", folder / "tied", num_hidden_layers=1, head_dim=128),
    }
    return made.__getitem__


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("spec", "table"), [(FOUR, FOUR), (EIGHT, EIGHT), (FOUR, EIGHT)], ids=["Q4_0", "Q8_0", "both"])
def test_transformers_gives_the_dequantized_models_logits(
    toys: Callable[[bool], Path], tmp_path: Path, spec: QuantSpec, table: QuantSpec, tied: bool
) -> None:
    artifact: Artifact = write_artifact(toys(tied), tmp_path / "artifact", spec, table)
    export(tmp_path / "artifact", tmp_path / "out", to="gguf", progress=False)
    ids = torch.from_numpy(np.random.default_rng(0).integers(8, 200, (2, 16)))
    checkpoint = Checkpoint.open(str(toys(tied)))
    assert checkpoint.tied == tied
    wanted = DequantizedModel(artifact, checkpoint).run({"input_ids": ids}).numpy()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32
    )
    with torch.no_grad():
        found = loaded.eval()(ids).logits.numpy()
    assert np.abs(found - wanted).max() <= LIMIT * np.abs(wanted).max()
