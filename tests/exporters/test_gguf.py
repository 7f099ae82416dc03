"""An artifact as a GGUF file and in again: the same integers around zero, the same weights, the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx_support import write_artifact
from tokenizers import Tokenizer

from conftest import build_model, scheme_per_layer
from roundexport import export, import_checkpoint
from roundexport.errors import UnsupportedError
from roundexport.exporters._gguf_blocks import blocks, fits, kind_of
from roundexport.formats.artifact import Artifact
from roundexport.model.checkpoint import Checkpoint
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec

gguf = pytest.importorskip("gguf")

Models = Callable[[str], Path]
SCHEMES = [QuantSpec(4, 32), QuantSpec(4, 64, symmetric=False), QuantSpec(3, None, symmetric=False), QuantSpec(2, 32)]


def random_linear(spec: QuantSpec, rows: int = 6, width: int = 128) -> QuantizedLinear:
    random = np.random.default_rng(spec.bits)
    groups = (rows, spec.groups(width))
    scales = random.normal(size=groups).astype(np.float16)
    zeros = None if spec.symmetric else random.integers(0, spec.max_code + 1, groups).astype(np.uint8)
    codes = random.integers(0, spec.max_code + 1, (rows, width)).astype(np.uint8)
    return QuantizedLinear.from_unpacked(spec, codes, scales, zeros)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_mean_what_the_integers_mean(bits: int, group: int | None, symmetric: bool) -> None:
    linear = random_linear(QuantSpec(bits, group, symmetric))
    kind = kind_of(linear.spec)
    assert kind == {2: "Q4_0", 3: "Q4_0", 4: "Q4_0" if symmetric else "Q5_0", 8: "Q8_0"}[bits]
    if not fits(linear):
        assert (bits, symmetric) == (8, False)
        return
    found = gguf.dequantize(blocks(linear), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(found, linear.dequantize())


def test_eight_asymmetric_bits_fit_where_their_differences_do() -> None:
    spec = QuantSpec(8, 32, symmetric=False)
    codes, zeros = np.array([[20, 255] * 16], np.uint8), np.array([[128]], np.uint8)
    assert fits(QuantizedLinear.from_unpacked(spec, codes, np.ones((1, 1), np.float16), zeros))
    assert not fits(QuantizedLinear.from_unpacked(spec, codes, np.ones((1, 1), np.float16), zeros - 1))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_goes_out_comes_in_again(tmp_path: Path, family: str) -> None:
    """Llama has rows in llama.cpp's order and a head of its own; Qwen3 norms of q and k, and a tied head.

    Qwen3's heads are as wide as its config has them by default: transformers' reader takes no other width.
    """
    wide = {} if family == "llama" else {"head_dim": 128}
    model = build_model(family, tmp_path / "model", num_hidden_layers=1, **wide)
    write_artifact(model, tmp_path / "artifact", scheme_per_layer(SCHEMES, QuantSpec(8, None)),
                   QuantSpec(8, None))  # fmt: skip
    report = export(tmp_path / "artifact", tmp_path / "out", to="gguf", progress=False)
    artifact = Artifact.open(tmp_path / "artifact")
    assert list(report.exported) == artifact.names()
    again = Artifact.open(import_checkpoint(tmp_path / "out" / "model.gguf", tmp_path / "again", progress=False))
    assert set(again.names()) == set(artifact.names())
    for name in artifact.names():
        assert np.array_equal(again.linear(name).dequantize(), artifact.linear(name).dequantize())
    source, found = Checkpoint.open(model), Checkpoint.open(tmp_path / "out" / "model.gguf")
    for name in source.owned():
        if name.removesuffix(".weight") not in artifact.names():
            assert np.array_equal(found.float32(name), source.float32(name)), name
    assert found.tied == source.tied
    text = "The 3 ships' captains, who didn't wait 12345 days …"
    first, second = (
        Tokenizer.from_file(str(one.folder / "tokenizer.json")).encode(text).ids for one in (source, found)
    )
    assert first == second


def test_what_has_no_exact_form_is_refused_with_the_nearest(models: Models, tmp_path: Path) -> None:
    write_artifact(models("llama, one block"), tmp_path / "artifact", QuantSpec(4, 16))
    with pytest.raises(UnsupportedError, match=r"groups are of 16 .*--group-size 32.*4 bits are Q4_0"):
        export(tmp_path / "artifact", tmp_path / "out", to="gguf", progress=False)
    write_artifact(models("gpt2, one block"), tmp_path / "gpt2", QuantSpec(4, 32))
    with pytest.raises(UnsupportedError, match=r"llama, mistral, qwen2, qwen3, not of gpt2"):
        export(tmp_path / "gpt2", tmp_path / "out", to="gguf", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("changes", "says"), [
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "angles are scaled"),
    ({"hidden_act": "gelu"}, "its activation is gelu"),
])  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    write_artifact(
        build_model("llama", tmp_path / "m", num_hidden_layers=1, **changes), tmp_path / "a", QuantSpec(4, 32)
    )
    with pytest.raises(UnsupportedError, match=says):
        export(tmp_path / "a", tmp_path / "out", to="gguf", progress=False)
