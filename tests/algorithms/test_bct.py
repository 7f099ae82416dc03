"""BCT: every weight compressed on a grid of powers of two, all of it counted, and exact in both targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from openvino import opset15 as ops

from roundexport import plugins, tune
from roundexport.algorithms.interface import BlockResult
from roundexport.algorithms.rounding import bct
from roundexport.conversion.inspection import inspect
from roundexport.errors import ArtifactError, Interrupted, SpecError
from roundexport.formats.artifact import Artifact
from roundexport.kernels import fake_quant, round_to_nearest
from roundexport.model.artifact_size import sizes
from roundexport.model.blocks import weight_of
from roundexport.model.checkpoint import Checkpoint
from roundexport.quant import power_of_two
from roundexport.quant.int8_tensor import Int8Tensor
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec
from roundexport.runtime.loading import load
from roundexport.targets.export import export
from roundexport.targets.onnx.kernel_forms import stored_form
from roundexport.targets.onnx.weight_layout import StoredWeight, decode, encode
from roundexport.targets.openvino.constants import stored_type, target_scales
from roundexport.targets.openvino.weight import compressed_chain
from roundexport.tuning.settings import TuneSettings

POWERS = QuantSpec(4, 16, True, "exponent8")
FAMILIES = ("bert", "gpt2", "qwen3")  # tables beside the tokens', Conv1D, a tied head


def settings(text: Path) -> TuneSettings:
    return TuneSettings(algorithm="bct", group_size=None, calibration=str(text), num_samples=4, sample_len=16)


@pytest.fixture(scope="module")
def artifact(
    models: Callable[[str], Path], calibration_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Artifact]:
    """``artifact("bert")`` is that family compressed whole."""
    root = tmp_path_factory.mktemp("bct")

    def get(family: str) -> Artifact:
        if not (root / family).exists():
            tune(
                models(family if family == "bert" else f"{family}, one block"),
                root / family,
                settings(calibration_text),
                progress=False,
            )
        return Artifact.open(root / family)

    return get


# --- the search


def error(found: QuantizedLinear, weight: torch.Tensor) -> float:
    return float(np.square(found.dequantize() - weight.numpy()).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_no_group_loses_more_than_on_the_nearest_power(bits: int, symmetric: bool) -> None:
    weight = torch.randn(200, 64, generator=torch.Generator().manual_seed(3))
    spec = QuantSpec(bits, 32, symmetric, "exponent8")
    searched, nearest = bct.quantize_table(weight, spec), round_to_nearest.run(weight, spec)
    assert error(searched, weight) < 0.95 * error(nearest, weight)  # measured .905 at 4 bits symmetric, less elsewhere
    grouped = [np.square(q.dequantize() - weight.numpy()).reshape(200, 2, -1).sum(-1) for q in (searched, nearest)]
    assert (grouped[0] <= grouped[1] * (1 + 1e-5)).all()  # float32 sums of 32 squares


def test_every_exponent_and_sign_was_worth_less() -> None:
    weight = torch.randn(20, 16, generator=torch.Generator().manual_seed(4))
    found = bct.quantize_table(weight, POWERS)
    best = np.full((20,), np.inf)
    for exponent in range(-8, 4):
        for sign in (1, -1):
            scale = np.float32(sign * 2.0**exponent)
            steps = np.clip(np.rint(weight.numpy() / scale), -8, 7)
            best = np.minimum(best, np.square(steps * scale - weight.numpy()).sum(1))
    np.testing.assert_allclose(np.square(found.dequantize() - weight.numpy()).sum(1), best, rtol=1e-5)


def test_tables_in_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 32, generator=torch.Generator().manual_seed(5))
    for symmetric in (True, False):
        spec = dataclasses.replace(POWERS, symmetric=symmetric)
        whole = bct.quantize_table(weight, spec)
        monkeypatch.setattr(bct, "_CHUNK", 7 * 32)
        assert bct.quantize_table(weight, spec).equals(whole)


# --- scales in a byte, norms and biases in eight bits


def test_bytes_of_scales_are_those_of_the_specification() -> None:
    scales = np.array([1, 0.5, -2, 2.0**-64, -(2.0**63)], np.float32)
    assert power_of_two.to_bytes(scales).tolist() == [0x40, 0x3F, 0xC1, 0x00, 0xFF]
    every = np.arange(256, dtype=np.uint8)
    assert np.array_equal(power_of_two.to_bytes(power_of_two.from_bytes(every)), every)
    assert len(np.unique(power_of_two.from_bytes(every))) == 256
    for value in (3.0, 0.0, np.inf, np.nan, 2.0**-65, 2.0**64):
        with pytest.raises(SpecError, match="no power of two"):
            power_of_two.to_bytes(np.array([value], np.float32))


def test_nearest_power_is_by_ratio_and_the_same_in_torch() -> None:
    values = np.random.default_rng(6).standard_normal(4000).astype(np.float32) * np.float32(1e-2)
    values = np.concatenate([values, np.array([2**0.5, 0.0, -0.0, 1e-30, -1e-30, 3e4, -5e4, np.inf], np.float32)])
    found = power_of_two.nearest(values)
    usual = (np.abs(values) > 2.0**-24) & (np.abs(values) < 4e4)
    expected = np.sign(values[usual]) * 2.0 ** np.round(np.log2(np.abs(values[usual].astype(np.float64))))
    assert np.array_equal(found[usual], expected)
    assert found[-7:].tolist() == [2.0**-24, 2.0**-24, 2.0**-24, -(2.0**-24), 2.0**15, -np.inf, np.inf]
    assert np.array_equal(fake_quant.nearest_power(torch.from_numpy(values)).numpy(), found)


@pytest.mark.parametrize("seed", range(5))
def test_a_vector_in_eight_bits_is_near_and_rounds_to_itself(seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(7 + seed).astype(np.float32) * np.float32(3.0**-seed)
    vector = Int8Tensor.nearest(values)
    # 128 steps hold the largest magnitude, which a power of two misses by up to 2: half a step is at most 1/128 of it.
    assert np.square(vector.values() - values).mean() ** 0.5 <= np.abs(values).max() / 128
    again = Int8Tensor.nearest(vector.values())
    assert (again.scale, again.codes.tolist()) == (vector.scale, vector.codes.tolist())


def test_vectors_without_sense_are_refused() -> None:
    assert Int8Tensor.nearest(np.zeros(3, np.float32)).values().tolist() == [0, 0, 0]
    with pytest.raises(SpecError, match="not finite"):
        Int8Tensor.nearest(np.array([1, np.nan], np.float32))
    with pytest.raises(SpecError, match="no power of two"):
        Int8Tensor(np.zeros(2, np.int8), 3.0)
    with pytest.raises(SpecError, match="codes must be int8"):
        Int8Tensor(np.zeros(2, np.uint8), 1.0)  # type: ignore[arg-type]


# --- the artifact


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_the_model_is_left_out(artifact: Callable[[str], Artifact], family: str) -> None:
    found = artifact(family)
    model = Checkpoint.open(found.manifest.source["location"]).load_model()
    matrices = {n.removesuffix(".weight") for n, p in model.named_parameters() if p.ndim == 2 and "pooler" not in n}
    assert set(found.names()) == matrices
    assert [name for name, _ in found.manifest.kept_float if "pooler" not in name] == []
    assert {found.entry(name).spec for name in matrices} == {QuantSpec(4, None, True, "exponent8")}
    vectors = {n for n, p in model.named_parameters() if p.ndim == 1 and "pooler" not in n}
    assert set(found.vectors()) == set(found.overrides()) == vectors
    for name in vectors:
        expected = Int8Tensor.nearest(model.get_parameter(name).detach().numpy())
        assert np.array_equal(found.overrides()[name], expected.values())


def test_stopped_between_blocks_it_goes_on_to_the_same_bytes(
    artifact: Callable[[str], Artifact], calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls, original = artifact("bert"), [], bct.tune_block

    def stop_at_the_second(*args: Any) -> BlockResult:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(bct, "METHOD", dataclasses.replace(bct.METHOD, tune_block=stop_at_the_second))
    model = whole.manifest.source["location"]
    with pytest.raises(Interrupted, match="1 of 2 blocks"):
        tune(model, tmp_path / "a", settings(calibration_text), progress=False)
    tune(model, tmp_path / "a", settings(calibration_text), progress=False)
    assert len(calls) == 3
    for path in whole.path.iterdir():
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()


def test_the_sizes_are_those_of_the_files(artifact: Callable[[str], Artifact]) -> None:
    found = artifact("bert")
    checkpoint = Checkpoint.open(found.manifest.source["location"])
    measured = sizes(found, checkpoint)
    stored = [*found.path.glob("*.safetensors"), found.path / "manifest.json"]
    assert measured.total == sum(path.stat().st_size for path in stored)
    assert measured.floats == measured.zero_points == 0
    floats = sum(np.prod(shape) for name, shape in checkpoint.owned().items() if "pooler" not in name)
    assert measured.float32 == 4 * floats
    assert measured.ratio == measured.float32 / measured.total
    facts = inspect(found.path).facts
    assert facts["bytes in all"] == measured.total
    assert facts["times smaller"] == round(measured.ratio, 3)
    unknown = sizes(found)
    assert (unknown.codes, unknown.total, unknown.ratio) == (measured.codes, None, None)


def test_float_tensors_that_are_left_count_four_bytes(
    models: Callable[[str], Path], calibration_text: Path, tmp_path: Path
) -> None:
    tune(models("bert"), tmp_path / "a", TuneSettings(algorithm="rtn", group_size=32), progress=False)
    checkpoint = Checkpoint.open(models("bert"))
    measured = sizes(Artifact.open(tmp_path / "a"), checkpoint)
    small = {n: s for n, s in checkpoint.owned().items() if "pooler" not in n and (len(s) == 1 or "position" in n)}
    small["type"] = (2, 64)
    assert measured.floats == 4 * sum(int(np.prod(shape)) for shape in small.values())


# --- the targets


def linear_with(scales: list[float], symmetric: bool = True) -> QuantizedLinear:
    """Rows of all codes, one row per scale."""
    spec = QuantSpec(4, None, symmetric, "exponent8")
    codes = np.tile(np.arange(16, dtype=np.uint8), (len(scales), 2))
    zero = None if symmetric else np.full((len(scales), 1), 3, np.uint8)
    return QuantizedLinear.from_unpacked(spec, codes, np.array(scales, np.float32)[:, None], zero)


@pytest.mark.parametrize("symmetric", [True, False])
def test_onnx_gives_back_the_same_powers(symmetric: bool) -> None:
    linear = linear_with([2.0**-64, -(2.0**-24), 1.0, 2.0**63], symmetric)
    form = stored_form(linear.spec, 32)
    stored = encode(linear, form)
    assert decode(stored, form.bits, linear.spec, 32, "layer").equals(linear)
    wrong = StoredWeight(stored.codes, stored.scales * np.float32(1.25), stored.zero_points)
    with pytest.raises(ArtifactError, match=r"layer: the scale .* is no power of two"):
        decode(wrong, form.bits, linear.spec, 32, "layer")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("scales", "dtype"),
    [
        ([2.0**-24, -(2.0**-20), 2.0**-14, 2.0**11], np.float16),
        ([2.0**-25, 1.0], np.float32),  # float16 has no such number
        ([2.0**13, 1.0], np.float32),  # float16 holds the scale, but not 15 steps of it
    ],
)
def test_openvino_computes_with_exactly_these_powers(scales: list[float], dtype: type, symmetric: bool) -> None:
    linear = linear_with(scales, symmetric)
    assert target_scales(linear).dtype == dtype
    table = compressed_chain(linear, stored_type(linear.spec, 32, "embedding"), "table.weight", port=0)
    ids = ops.parameter([-1], np.int32, name="ids")
    model = ov.Model([ops.gather(table, ids, ops.constant(np.int64(0)))], [ids], "gather")
    rows = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([np.arange(len(scales))])[0]
    np.testing.assert_array_equal(rows, linear.dequantize())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "family"), [("onnx", "bert"), ("openvino", "bert"), ("onnx", "gpt2"), ("openvino", "qwen3")]
)
def test_packages_compute_what_the_artifact_says(
    artifact: Callable[[str], Artifact], to: str, family: str, tmp_path: Path
) -> None:
    found = artifact(family)
    report = export(found.path, tmp_path / "package", to=to)
    assert set(report.exported) == set(found.names())
    back = plugins.load("targets", to).read_back(tmp_path / "package")
    assert all(back[name].equals(found.linear(name)) for name in found.names())
    model = Checkpoint.open(found.manifest.source["location"]).load_model().requires_grad_(False)
    for name in found.names():
        weight_of(model.get_submodule(name)).copy_(torch.from_numpy(found.linear(name).dequantize()))
    for name, values in found.overrides().items():
        model.get_parameter(name).copy_(torch.from_numpy(values))
    engine = load(tmp_path / "package", precise=True)
    ids = np.random.default_rng(7).integers(4, 384, (2, 9))
    if family == "bert":
        texts = ["a small table of words", "another one, a little longer than the first"]
        inputs = [engine.encode([text]) for text in texts]
        states = [model(**{n: torch.from_numpy(a) for n, a in one.items()}).last_hidden_state for one in inputs]
        pairs = zip(states, inputs, strict=True)
        expected = np.concatenate([engine.pool(s.numpy(), one["attention_mask"]) for s, one in pairs])
        got = engine.embed(texts)
    else:
        expected, got = model(input_ids=torch.from_numpy(ids)).logits.numpy(), engine.logits(ids)
    # Two layers in float32 on both sides; sums of up to 128 terms in another order.
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
