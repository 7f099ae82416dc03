"""Out in a format of others and in again: the same integers, scales, zero points and floats, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx_support import write_artifact

from conftest import build_model, scheme_per_layer
from roundexport import export, import_checkpoint
from roundexport.errors import UnsupportedError, UsageError
from roundexport.exporters._outgoing import narrowest, stored
from roundexport.formats.artifact import Artifact
from roundexport.model.checkpoint import Checkpoint
from roundexport.quant.spec import LinearInfo, QuantSpec

Models = Callable[[str], Path]
Scheme = QuantSpec | Callable[[LinearInfo], QuantSpec]
WIDE = ("auto_round", "gptq", "compressed-tensors")
MIXED = scheme_per_layer([QuantSpec(4, 32), QuantSpec(8, None), QuantSpec(3, 16), QuantSpec(2, 64)], QuantSpec(8, 32))
BOTH = scheme_per_layer([QuantSpec(4, 32), QuantSpec(4, 32, symmetric=False)], QuantSpec(8, 32))


def assert_same_numbers(first: Artifact, second: Artifact) -> None:
    """The second holds what the first does, and its model's floats are the first's."""
    tables = {name for name in first.names() if first.entry(name).info.kind == "embedding"}
    assert [name for name in first.names() if name not in tables] == second.names()
    for name in second.names():
        one, other = first.linear(name), second.linear(name)
        assert (one.spec.bits, one.groups) == (other.spec.bits, other.groups)
        assert np.array_equal(one.codes, other.codes)
        assert np.array_equal(one.full_zero_points(), other.full_zero_points())
        assert np.array_equal(one.scales.astype(np.float32), other.scales.astype(np.float32))
    source, found = (Checkpoint.open(str(artifact.manifest.source["location"])) for artifact in (first, second))
    overrides = first.overrides()
    for name in source.owned():
        module = name.removesuffix(".weight")
        if module in tables:
            assert np.array_equal(found.float32(name), first.linear(module).dequantize())
        elif module not in first.names():
            assert np.array_equal(found.float32(name), overrides.get(name, source.float32(name))), name


def round_trip(model: Path, tmp: Path, to: str, scheme: Scheme, table: QuantSpec | None = None, **more: object) -> Path:
    artifact = write_artifact(model, tmp / "artifact", scheme, table, **more)  # type: ignore[arg-type]
    report = export(tmp / "artifact", tmp / "out", to=to, progress=False)
    assert set(report.exported) <= set(artifact.names())
    assert sum(report.files.values()) == sum(path.stat().st_size for path in (tmp / "out").rglob("*"))
    again = Artifact.open(import_checkpoint(tmp / "out", tmp / "again", progress=False))
    assert_same_numbers(artifact, again)
    return tmp / "out"


@pytest.mark.parametrize("to", WIDE)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group", "symmetric"), [(32, True), (None, False)])
def test_what_goes_out_comes_in_again(
    models: Models, tmp_path: Path, to: str, bits: int, group: int | None, symmetric: bool
) -> None:
    round_trip(models("llama, one block"), tmp_path, to, QuantSpec(bits, group, symmetric))


@pytest.mark.parametrize(("group", "symmetric"), [(32, True), (64, False), (None, False)])
def test_awq_too(models: Models, tmp_path: Path, group: int | None, symmetric: bool) -> None:
    out = round_trip(models("llama, one block"), tmp_path, "awq", QuantSpec(4, group, symmetric))
    assert json.loads((out / "config.json").read_text())["quantization_config"]["modules_to_not_convert"] == [
        "lm_head", "model.embed_tokens",
    ]  # fmt: skip


@pytest.mark.parametrize("to", WIDE)
@pytest.mark.parametrize("scheme", [MIXED, BOTH], ids=["bits", "symmetry"])
def test_every_layer_may_have_a_scheme_of_its_own(models: Models, tmp_path: Path, to: str, scheme: Scheme) -> None:
    round_trip(models("llama"), tmp_path, to, scheme, keep_float=("layers.1.mlp.up_proj",))


@pytest.mark.parametrize("to", [*WIDE, "awq"])
@pytest.mark.parametrize("family", ["qwen3, one block", "gpt2, one block"])
def test_tables_are_floats_and_stay_tied(models: Models, tmp_path: Path, to: str, family: str) -> None:
    """Of Qwen3 the head is tied; GPT-2 has biases, and stores its matrices turned."""
    out = round_trip(models(family), tmp_path, to, QuantSpec(4, 32, symmetric=False), QuantSpec(8, 32))
    assert Checkpoint.open(out).tied


@pytest.mark.parametrize("to", WIDE)
def test_a_head_of_its_own_is_quantized_too(models: Models, tmp_path: Path, to: str) -> None:
    artifact = write_artifact(models("llama, one block"), tmp_path / "artifact", QuantSpec(4, 32), QuantSpec(8, 32))
    assert "lm_head" in artifact.names()
    report = export(tmp_path / "artifact", tmp_path / "out", to=to, progress=False)
    assert "lm_head" in report.exported
    assert [name for name, _ in report.kept_float] == ["model.embed_tokens"]
    assert any("written as the floats" in note for note in report.notes)
    assert_same_numbers(artifact, Artifact.open(import_checkpoint(tmp_path / "out", tmp_path / "again")))


@pytest.mark.parametrize("to", WIDE)
def test_experts_go_out_one_by_one(tmp_path: Path, to: str) -> None:
    round_trip(build_model("mixtral", tmp_path / "model"), tmp_path, to, QuantSpec(4, 32))


@pytest.mark.parametrize(("values", "dtype"), [([1.5, -2.0**-24], "F16"), ([1e-30, 0.0], "F32"),
                                               ([2.0**-30, 65536.0], "BF16"), ([1 + 2**-10], "F16")])  # fmt: skip
def test_the_narrowest_dtype_that_holds_every_scale(values: list[float], dtype: str) -> None:
    scales = np.array(values, np.float32)
    assert narrowest(scales) == dtype
    held = stored(scales, narrowest(scales))
    whole = (held.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else held.astype(np.float32)
    assert np.array_equal(whole, scales)


def test_scales_of_float32_are_refused(models: Models, tmp_path: Path) -> None:
    artifact = write_artifact(models("llama, one block"), tmp_path / "artifact", QuantSpec(4, 32, True, "float32"))
    with pytest.raises(UnsupportedError, match=r"cannot hold model\.layers\.0.*float32.*and 6 more layers"):
        export(artifact.path, tmp_path / "out", to="gptq", progress=False)


@pytest.mark.parametrize(("to", "scheme", "says"), [
    ("awq", QuantSpec(8, 32), "has 8 bits, AWQ has 4"),
    ("awq", scheme_per_layer([QuantSpec(4, 32), QuantSpec(4, 64)], QuantSpec(4, 32)), "one group size for all"),
])  # fmt: skip
def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(
    models: Models, tmp_path: Path, to: str, scheme: Scheme, says: str
) -> None:
    write_artifact(models("llama, one block"), tmp_path / "artifact", scheme)
    with pytest.raises(UnsupportedError, match=says):
        export(tmp_path / "artifact", tmp_path / "out", to=to, progress=False)
    assert not (tmp_path / "out").exists()


def test_rows_that_fill_no_words_are_refused(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path / "model", num_hidden_layers=1, intermediate_size=80)
    write_artifact(model, tmp_path / "artifact", QuantSpec(3, 16))
    with pytest.raises(UnsupportedError, match="80 outputs of 3 bits do not fill whole 32-bit words"):
        export(tmp_path / "artifact", tmp_path / "out", to="gptq", progress=False)
    round_trip(model, tmp_path / "second", "compressed-tensors", QuantSpec(3, 16, symmetric=False))


def test_settings_of_a_runtime_and_unknown_names_are_refused(models: Models, tmp_path: Path) -> None:
    write_artifact(models("llama, one block"), tmp_path / "artifact", QuantSpec(4, 32))
    for settings, says in (({"device": "gpu"}, "no setting device"), ({"max_context": 9}, "no setting max_context")):
        with pytest.raises(UsageError, match=says):
            export(tmp_path / "artifact", tmp_path / "out", to="gptq", progress=False, **settings)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"unknown target 'exl2'; known: onnx, openvino.*auto_round"):
        export(tmp_path / "artifact", tmp_path / "out", to="exl2", progress=False)
    with pytest.raises(UnsupportedError, match="no quantized linear"):
        export(models("llama, one block"), tmp_path / "out", to="gptq", progress=False)
    assert not (tmp_path / "out").exists()
