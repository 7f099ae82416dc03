"""Embedders on both runtimes: decoders, causal without a cache and padded on either side; vectors from the graph."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from onnx_support import session
from openvino_tools import EXACT, run_steps
from safetensors.numpy import save_file

from conftest import FAMILIES
from roundexport.errors import UnsupportedError, UsageError
from roundexport.model.checkpoint import Checkpoint
from roundexport.runtime import Encoder, load
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


MODES = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_vectors_come_out_of_the_graph(target: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    folder, random = Path(shutil.copytree(models("bert, one block"), tmp_path / "m")), np.random.default_rng(0)
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"), ("Normalize", "3_Normalize")]
    (folder / "modules.json").write_text(json.dumps([{"type": kind, "path": path} for kind, path in kinds]))
    for path, config in (("1_Pooling", {"pooling_mode": MODES}), ("2_Dense", {"bias": False})):
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(config))
    weight = random.standard_normal((5, 6 * 64)).astype(np.float32) * 0.05
    save_file({"linear.weight": weight}, folder / "2_Dense" / "model.safetensors")
    export(folder, tmp_path / "p", to=target, settings={"pooled": True}, progress=False)
    package, checkpoint = load(tmp_path / "p", precise=True), Checkpoint.open(folder)
    assert isinstance(package, Encoder) and package.width == 5
    rows = [random.integers(4, 384, length).tolist() for length in (9, 3, 1)]
    found, inputs = package.embed_ids(rows), package.padded(rows, None)
    with torch.no_grad():
        given = {name: torch.from_numpy(values) for name, values in inputs.items()}
        hidden = checkpoint.load_model()(**given).last_hidden_state.numpy()
    assert np.abs(found - checkpoint.embedding_head()(hidden, inputs["attention_mask"])).max() < 1e-5
    with pytest.raises(UnsupportedError, match="gives vectors, not hidden states"):
        package.pool(hidden, inputs["attention_mask"])


def test_only_embedders_are_pooled(models: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pooled is for models that embed; this one's task is generate"):
        export(models("llama, one block"), tmp_path / "p", settings={"pooled": True}, progress=False)
