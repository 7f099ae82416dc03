"""Exported folders loaded by transformers with their owners' packages, where those are installed: equal logits.

The whole set, in environments of the owners' own, is samples/foreign_checkpoints/run.sh; here the formats whose package
is beside transformers, in layers that compute in torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_support import write_artifact

from roundexport import export
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.dequantized_model import DequantizedModel
from roundexport.quant.spec import QuantSpec

PACKAGES = {
    "auto_round": ("auto_round",),
    "gptq": ("gptqmodel", "optimum"),
    "compressed-tensors": ("compressed_tensors",),
}
# auto-round turns the whole model to float16 while it loads
LIMITS = {"auto_round": 2e-3, "gptq": 1e-5, "compressed-tensors": 1e-5}


@pytest.mark.compat
@pytest.mark.parametrize("to", PACKAGES)
def test_transformers_gives_the_dequantized_models_logits(
    models: Callable[[str], Path], tmp_path: Path, to: str
) -> None:
    for package in PACKAGES[to]:
        pytest.importorskip(package)
    transformers: Any = importlib.import_module("transformers")
    artifact = write_artifact(models("llama"), tmp_path / "artifact", QuantSpec(4, 32))
    export(tmp_path / "artifact", tmp_path / "out", to=to, progress=False)
    ids = torch.from_numpy(np.random.default_rng(0).integers(8, 200, (2, 16)))
    wanted = DequantizedModel(artifact, Checkpoint.open(str(models("llama")))).run({"input_ids": ids}).numpy()
    more = {"quantization_config": transformers.GPTQConfig(bits=4, backend="torch")} if to == "gptq" else {}
    with torch.no_grad():
        load = transformers.AutoModelForCausalLM.from_pretrained
        found = load(tmp_path / "out", dtype=torch.float32, device_map="cpu", **more).eval()(ids).logits.float().numpy()
    assert np.abs(found - wanted).max() <= LIMITS[to] * np.abs(wanted).max()
