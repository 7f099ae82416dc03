"""Scores far beyond float16's range: a mask must still hide later tokens, other windows and padding."""

from __future__ import annotations

import numpy as np
import openvino as ov
import pytest
import torch
from openvino import opset15 as ops
from openvino_tools import EXACT

from roundexport.graph.capture import Capture
from roundexport.targets.openvino.graph import Graph
from roundexport.targets.openvino.mask import shared_mask

SCORES = 1e9  # what a norm weight of 3e4 gives in a small Llama
B, T, S, D = 2, 7, 5, 8


def attention(window: int, causal: bool, properties: dict[str, str], padding: int = 2) -> np.ndarray:
    """Attention [B, 1, S, D], where later keys have larger scores and values are places; row 1 has padding."""
    graph = Graph(capture=Capture.__new__(Capture), weights=None, device="cpu")  # type: ignore[arg-type]
    mask_input = ops.parameter([-1, -1], np.int64)
    query, key, value = (ops.parameter([-1, 1, -1, D], np.float32) for _ in range(3))
    mask = shared_mask(graph, mask_input.output(0), query, window, causal)
    out = ops.scaled_dot_product_attention(query, key, value, mask, ops.constant(np.float32(1)), causal=False)
    model = ov.Model([out], [mask_input, query, key, value], "masked")
    compiled = ov.Core().compile_model(model, "CPU", properties)
    places = np.arange(T, dtype=np.float32)
    keys = np.zeros((B, 1, T, D), np.float32)
    keys[..., 0] = SCORES * (places - T)
    values = np.broadcast_to(places[:, None], (B, 1, T, D)).copy()
    tokens = np.ones((B, T), np.int64)
    tokens[1, :padding] = 0
    return np.array(
        compiled([tokens, np.eye(1, D, dtype=np.float32)[None, None].repeat(B, 0).repeat(S, 2), keys, values])[0]
    )


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize(("window", "causal"), [(-1, True), (3, True), (-1, False), (3, False)])
def test_the_last_visible_key_wins(window: int, causal: bool, precision: str) -> None:
    found = attention(window, causal, {**EXACT, "INFERENCE_PRECISION_HINT": precision})
    query = np.arange(T - S, T)
    last = query if causal else np.full(S, T - 1) if window < 0 else np.minimum(query + window - 1, T - 1)
    assert torch.equal(torch.from_numpy(found[0, 0, :, 0]), torch.from_numpy(last.astype(np.float32)))
    assert np.array_equal(found[1], found[0])


def test_a_row_that_sees_nothing_is_finite() -> None:
    # The first queries of a row with left padding, in a chunk that begins inside of the padding.
    assert np.isfinite(attention(-1, True, EXACT, padding=4)).all()
    assert np.isfinite(attention(2, True, {**EXACT, "INFERENCE_PRECISION_HINT": "bf16"}, padding=4)).all()
