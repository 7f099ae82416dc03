"""Exported folders loaded by transformers with their owners' packages, where those are installed: equal logits.

The whole set, in environments of the owners' own, is samples/foreign_checkpoints/run.sh; here the formats whose package
is beside transformers, by the sample's own means: layers that compute in torch, and floats taken from the file again,
because auto-round turns the whole model to float16 while it loads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_support import write_artifact
from sample_modules import sample_modules

from roundexport import export
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.dequantized_model import DequantizedModel
from roundexport.quant.spec import QuantSpec

PACKAGES = {
    "auto_round": ("auto_round",),
    "gptq": ("gptqmodel", "optimum"),
    "compressed-tensors": ("compressed_tensors",),
}


@pytest.mark.compat
@pytest.mark.filterwarnings("ignore")  # owners' packages use what transformers and Python are about to drop
@pytest.mark.parametrize("to", PACKAGES)
def test_transformers_gives_the_dequantized_models_logits(
    models: Callable[[str], Path], tmp_path: Path, to: str
) -> None:
    for package in PACKAGES[to]:
        pytest.importorskip(package)
    artifact = write_artifact(models("llama"), tmp_path / "artifact", QuantSpec(4, 32))
    export(tmp_path / "artifact", tmp_path / "out", to=to, progress=False)
    ids = np.random.default_rng(0).integers(8, 200, (2, 16))
    model = DequantizedModel(artifact, Checkpoint.open(str(models("llama"))))
    wanted = model.run({"input_ids": torch.from_numpy(ids)}).numpy()
    with sample_modules("foreign_checkpoints", "loaded") as sample:
        loaded = sample["loaded"]
        found = loaded.load(tmp_path / "out", plain=True)
        loaded.restore(found, tmp_path / "out")
        assert loaded.difference(found, {"ids": ids, "logits": wanted}) <= loaded.LIMIT
