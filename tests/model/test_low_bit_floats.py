"""Weights published as 4- and 8-bit floats: the values that transformers gives them, read a piece at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoint_tools import assert_holds_the_model
from safetensors.torch import load_file, save_file
from small_float_checkpoints import fp8_folder, mxfp4_folder
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from roundexport import TuneSettings, convert
from roundexport.errors import CheckpointError, RoundexportError, UnsupportedError
from roundexport.families.configurations import families
from roundexport.families.toy import write_model
from roundexport.importers._tensors import Tensors
from roundexport.importers.interface import QuantizedFolder
from roundexport.model.block_fp8 import fp8_weights
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.low_bit_floats import LowBitFloats
from roundexport.model.mxfp4 import mxfp4_weights
from roundexport.model.streamed_model import StreamedModel
from roundexport.storage.safetensors_reader import TensorFile

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Opening = Callable[..., LowBitFloats]


@pytest.fixture
def opened(tmp_path: Path) -> Opening:
    """``opened(read, tensors, **config)``: what is read of a file."""

    def get(read: Callable[[QuantizedFolder], LowBitFloats], tensors: dict[str, Any], **config: Any) -> LowBitFloats:
        save_file(tensors, tmp_path / "model.safetensors")
        file = TensorFile(tmp_path / "model.safetensors")
        return read(QuantizedFolder("checkpoint", config, Tensors({"a": file}, dict.fromkeys(file.names, "a"))))

    return get


def codes(shape: tuple[int, ...], dtype: torch.dtype = E4M3) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)


def test_mxfp4_is_what_transformers_makes_of_it(opened: Opening) -> None:
    draw = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 8, 2, 16), generator=draw, dtype=torch.uint8)
    scales = torch.randint(60, 190, (3, 8, 2), generator=draw, dtype=torch.uint8)
    found = opened(mxfp4_weights, {"e.down_proj_blocks": blocks, "e.down_proj_scales": scales})
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).numpy()
    assert found.shape("e.down_proj") == expected.shape == (3, 64, 8)
    assert np.array_equal(found.read_float32("e.down_proj"), expected)
    assert np.array_equal(found.read_float32("e.down_proj", (1, 2)), expected[1:2])


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_every_code_of_8_bits(opened: Opening, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype).reshape(16, 16)
    found = opened(fp8_weights, {"a.weight": every, "a.weight_scale_inv": torch.ones(())})
    assert np.array_equal(found.read_float32("a.weight"), every.float().numpy(), equal_nan=True)


SCALES: dict[str, tuple[tuple[int, ...], torch.Tensor, list[int] | None]] = {
    "128 × 128": ((256, 384), torch.rand(2, 3) + 0.1, [128, 128]),
    "of a stack": ((3, 64, 32), torch.rand(3, 2, 1) + 0.1, [32, 32]),
    "bfloat16": ((256, 128), (torch.rand(2, 1) + 0.1).bfloat16(), [128, 128]),
    "exponents": ((64, 64), torch.randint(100, 140, (64, 2), dtype=torch.uint8), [1, 32]),
    "of float8 exponents": ((64, 64), torch.rand(64, 2).to(torch.float8_e8m0fnu), [1, 32]),
    "one": ((300, 32), torch.tensor(0.3), None),
    "one in a list": ((300, 32), torch.tensor([0.3]), [128, 128]),
}


@pytest.mark.parametrize("case", SCALES)
def test_fp8_is_what_transformers_makes_of_it(opened: Opening, case: str) -> None:
    shape, scales, block = SCALES[case]
    weight = codes(shape)
    found = opened(fp8_weights, {"a.weight": weight, "a.weight_scale_inv": scales}, weight_block_size=block)
    grid = scales.reshape(1, 1) if scales.ndim < 2 else scales
    expected = Fp8Dequantize(None)._dequantize_one(weight, grid, torch.float32).numpy()
    assert np.array_equal(found.read_float32("a.weight"), expected)
    first, last = shape[0] // 3, shape[0] // 3 * 2  # begins inside a block
    assert np.array_equal(found.read_float32("a.weight", (first, last)), expected[first:last])


def test_blocks_at_the_edges_may_be_cut_off(opened: Opening) -> None:
    """DeepSeek-V3's kv_a_proj_with_mqa has 576 rows, four blocks and a half."""
    weight, scales = codes((200, 136)), torch.rand(2, 2) + 0.1
    found = opened(fp8_weights, {"a.weight": weight, "a.weight_scale_inv": scales}, weight_block_size=[128, 128])
    wide = scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :136]
    assert np.array_equal(found.read_float32("a.weight"), (weight.float() * wide).numpy())


def _mxfp4(**changed: Any) -> dict[str, Any]:
    made = {
        "a_blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8),
        "a_scales": torch.zeros(2, 4, 1, dtype=torch.uint8),
    }
    return {name: values for name, values in {**made, **changed}.items() if values is not None}


FP8 = {"a.weight": codes((64, 64)), "a.weight_scale_inv": torch.ones(2, 2)}
REFUSED: dict[str, tuple[Any, dict[str, Any], dict[str, Any], type[RoundexportError], str]] = {
    "no scales": (mxfp4_weights, _mxfp4(a_scales=None), {}, CheckpointError, "no tensor a_scales"),
    "NaN": (mxfp4_weights, _mxfp4(a_scales=torch.full((2, 4, 1), 255).byte()), {}, CheckpointError, "NaN"),
    "beyond float32": (
        mxfp4_weights,
        _mxfp4(a_scales=torch.full((2, 4, 1), 254).byte(), a_blocks=torch.full((2, 4, 1, 16), 0x77).byte()),
        {}, CheckpointError, "beyond float32",
    ),
    "blocks of 16": (mxfp4_weights, _mxfp4(a_blocks=torch.zeros(2, 4, 1, 8).byte()), {}, CheckpointError, "a_blocks"),
    "a matrix": (mxfp4_weights, _mxfp4(a_blocks=torch.zeros(4, 1, 16).byte()), {}, CheckpointError, "experts, rows"),
    "twice": (mxfp4_weights, _mxfp4(a=torch.zeros(2, 32, 4)), {}, CheckpointError, "hold a twice"),
    "nothing": (mxfp4_weights, {"a": torch.zeros(1)}, {}, CheckpointError, "no weight is stored so"),
    "no scale": (fp8_weights, {"a.weight": codes((64, 64))}, {}, CheckpointError, "no a.weight_scale_inv beside"),
    "another grid": (fp8_weights, FP8, {"weight_block_size": [64, 64]}, CheckpointError, r"\[1, 1\] or one per weight"),
    "no grid": (fp8_weights, FP8, {}, CheckpointError, "one per weight is expected"),
    "4-bit experts": (fp8_weights, FP8, {"expert_dtype": "fp4"}, UnsupportedError, "experts are fp4"),
    "block": (fp8_weights, FP8, {"weight_block_size": [0]}, UnsupportedError, "weight_block_size"),
    "a vector": (fp8_weights, {**FP8, "a.weight": codes((64,))}, {}, UnsupportedError, "matrices"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(opened: Opening, case: str) -> None:
    read, tensors, config, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words):
        opened(read, tensors, **config).read_float32("a")


def test_gpt_oss_as_it_is_published(tmp_path: Path) -> None:
    short, widened = tmp_path / "mxfp4", tmp_path / "widened"
    write_model(families()["gpt_oss"], widened)
    mxfp4_folder(widened, short)
    assert_transformers_agrees(short, widened, transformers.Mxfp4Config(dequantize=True))
    checkpoint = Checkpoint.open(short)
    assert any("4 of its tensors are stored as 4-bit floats (MXFP4)" in note for note in checkpoint.notes)
    assert StreamedModel(checkpoint).streamed  # an expert at a time


@pytest.mark.compat
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3_moe"])
def test_it_converts_to_both_targets(family: str, tmp_path: Path) -> None:
    write_model(families()[family], tmp_path / "float")
    if family == "gpt_oss":
        mxfp4_folder(tmp_path / "float", tmp_path / "short")
    else:
        fp8_folder(tmp_path / "float", tmp_path / "short", block=16)
    done = convert(tmp_path / "short", tmp_path / "out", TuneSettings(recipe="rtn", bits=8, group_size=32))
    assert set(done.packages) == {"onnx", "openvino"}
    assert all(report.integers_checked and not report.failures for report in done.quality.values())


def test_deepseek_as_it_is_published(tmp_path: Path) -> None:
    short, widened = tmp_path / "fp8", tmp_path / "widened"
    write_model(families()["deepseek_v3_moe"], widened)
    fp8_folder(widened, short, block=16)
    assert load_file(short / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].dtype == E4M3
    own = transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 16))
    assert_transformers_agrees(short, widened, own)


def assert_transformers_agrees(short: Path, widened: Path, own: Any) -> None:
    """A folder is, by name and loaded, what transformers dequantizes it to; that is left in ``widened``."""
    model = transformers.AutoModelForCausalLM.from_pretrained(short, quantization_config=own, dtype=torch.float32)
    stored = {name: values.clone() for name, values in model.state_dict().items()}
    save_file(stored, widened / "model.safetensors")
    one, other = Checkpoint.open(short), Checkpoint.open(widened)
    assert one.names() == other.names() and one.imported is None
    for name in one.names():
        assert np.array_equal(one.float32(name), other.float32(name)), name
    assert_holds_the_model(one)
