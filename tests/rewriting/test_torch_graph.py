"""An artifact's integers in a graph that torch itself exported of a whole decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx_support import write_artifact
from transformers import AutoModelForCausalLM

from roundexport import rewrite
from roundexport.quant.spec import QuantSpec


@pytest.mark.filterwarnings("ignore")  # of torch: this way is its older one, and traces
def test_a_graph_of_torch_onnx_export(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Whole, as torch writes it: names of its own, weights turned, constants folded."""
    model = models("llama, one block")
    write_artifact(model, tmp_path / "artifact", QuantSpec(4, 32), QuantSpec(8, 32))
    whole = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager", dtype=torch.float32).eval()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = whole

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.whole(input_ids=ids, attention_mask=mask, use_cache=False).logits

    ids = torch.arange(4, 24).reshape(2, 10)
    axes = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask", "logits")}
    torch.onnx.export(
        Logits().eval(), (ids, torch.ones_like(ids)), str(tmp_path / "model.onnx"), dynamo=False, opset_version=17,
        input_names=["input_ids", "attention_mask"], output_names=["logits"], dynamic_axes=axes,
    )  # fmt: skip
    done = rewrite(tmp_path / "model.onnx", tmp_path / "artifact", tmp_path / "out", progress=False)
    assert len(done.layers) == 9 and not done.missing
    assert done.outputs.difference < 1e-5
    kinds = [node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node]
    assert kinds.count("MatMulNBits") == 8 and kinds.count("GatherBlockQuantized") == 1
