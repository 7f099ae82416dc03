"""Integers out of GGUF blocks of random bytes, held against the gguf package's own dequantization."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from roundexport.model.gguf_header import GgufHeader, GgufTensor
from roundexport.model.gguf_integers import GgufIntegers

gguf = pytest.importorskip("gguf")

ROWS, WIDTH, NAME = 8, 512, "model.layers.0.self_attn.q_proj.weight"


def _blocks(kind: str) -> np.ndarray:
    """Random blocks whose scales are finite: small float16 numbers."""
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    random = np.random.default_rng(1)
    blocks = random.integers(0, 256, (ROWS, WIDTH // weights, size)).astype(np.uint8)
    scales = (random.normal(size=blocks.shape[:2]) * 0.02).astype("<f2")[..., None].view(np.uint8)
    place = slice(-2, None) if kind == "Q6_K" else slice(0, 2)
    blocks[..., place] = scales
    return blocks


@pytest.mark.parametrize(("kind", "scheme"), [
    ("Q4_0", "int4 g32 sym"), ("Q5_0", "int8 g32 sym"), ("Q8_0", "int8 g32 sym"), ("Q6_K", "int8 g16 sym"),
])  # fmt: skip
@pytest.mark.parametrize("order", ["the file's", "llama.cpp's rotary"])
def test_codes_times_scales_are_the_weights(tmp_path: Path, kind: str, scheme: str, order: str) -> None:
    blocks = _blocks(kind)
    (tmp_path / "file").write_bytes(blocks.tobytes())
    number = gguf.GGMLQuantizationType[kind]
    header = GgufHeader(
        tmp_path / "file", {"general.architecture": "llama"},
        (GgufTensor("blk.0.attn_q.weight", (ROWS, WIDTH), number.value, 0),), 0,
    )  # fmt: skip
    weight = gguf.dequantize(blocks.reshape(ROWS, -1), number)
    if order != "the file's":
        weight = weight.reshape(2, -1, 2, WIDTH).swapaxes(1, 2).reshape(weight.shape)
    integers = GgufIntegers(header, {"num_hidden_layers": 1, "num_attention_heads": 2})
    linear = integers.linear(NAME, np.ascontiguousarray(weight))
    assert linear is not None
    assert linear.spec.describe() == scheme
    assert np.array_equal(linear.dequantize(), weight)


def test_an_order_of_rows_that_is_not_known_is_not_imported(tmp_path: Path) -> None:
    blocks = _blocks("Q4_0")
    (tmp_path / "file").write_bytes(blocks.tobytes())
    number = gguf.GGMLQuantizationType.Q4_0
    tensor = GgufTensor("blk.0.attn_q.weight", (ROWS, WIDTH), number.value, 0)
    header = GgufHeader(tmp_path / "file", {"general.architecture": "llama"}, (tensor,), 0)
    weight = gguf.dequantize(blocks.reshape(ROWS, -1), number)[::-1]
    integers = GgufIntegers(header, {"num_hidden_layers": 1, "num_attention_heads": 2})
    assert integers.linear(NAME, np.ascontiguousarray(weight)) is None
