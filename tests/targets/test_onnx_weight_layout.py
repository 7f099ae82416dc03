"""The bytes of MatMulNBits and GatherBlockQuantized: exact both ways, fast forms chosen, read right by the kernels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnx_support import round_to_nearest

from roundexport.errors import ArtifactError
from roundexport.kernels import group_matmul
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import BITS, GROUP_SIZES, QuantSpec
from roundexport.targets.onnx.kernel_forms import FAST_BLOCKS, StoredForm, slow, stored_form
from roundexport.targets.onnx.weight_layout import StoredWeight, decode, encode, stack

SPECS = [QuantSpec(bits, group, sym) for bits in BITS for group in (*GROUP_SIZES, None) for sym in (True, False)]
ROWS, WIDTH = 7, 256


def make(spec: QuantSpec, width: int = WIDTH) -> QuantizedLinear:
    return round_to_nearest(np.random.default_rng(5).standard_normal((ROWS, width)).astype(np.float32), spec)


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.describe)
def test_stored_form_is_fast_and_gives_the_artifact_back(spec: QuantSpec) -> None:
    linear, form = make(spec), stored_form(spec, WIDTH)
    assert form.block in FAST_BLOCKS[form.bits]
    stored = encode(linear, form)
    assert decode(stored, form.bits, spec, WIDTH, "layer").equals(linear)
    if form == StoredForm(spec.bits, spec.group_size or 0, not spec.symmetric):  # what a plan counts, in whole bytes
        grid = len(linear.codes) * linear.groups
        zeros = 0 if stored.zero_points is None else 8 * stored.zero_points.nbytes
        assert (
            0 <= 8 * stored.codes.nbytes + zeros + spec.scale_bits * grid - linear.storage_bits < 8 * len(linear.codes)
        )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [24, 100, 200])
def test_whole_rows_that_no_block_divides_are_filled_up(bits: int, width: int) -> None:
    spec = QuantSpec(bits, None, False)
    linear, form = make(spec, width), stored_form(spec, width)
    stored = encode(linear, form)
    assert stored.codes.shape == (ROWS, -(-width // form.block), form.block * form.bits // 8)
    assert decode(stored, form.bits, spec, width, "layer").equals(linear)


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.describe)
@pytest.mark.parametrize("accuracy_level", [0, 4])
def test_kernel_computes_the_reference_product(spec: QuantSpec, accuracy_level: int) -> None:
    linear, form = make(spec), stored_form(spec, WIDTH)
    x = np.random.default_rng(6).standard_normal((3, WIDTH)).astype(np.float32)
    x[2, : WIDTH // 2] = 0  # blocks without a largest value
    got = run_matmul(encode(linear, form), form, x, accuracy_level)
    plain = group_matmul.reference(x, linear)
    weight = np.abs(linear.dequantize()).astype(np.float64)
    # Each of the K roundings of a float32 sum is at most 2^-24 of Σ|x·w|.  As a random walk they add up to sqrt(K) = 16
    # of them; the largest seen over all schemes and ten draws of x is 4.
    limit = WIDTH**0.5 * 2.0**-24 * (np.abs(x).astype(np.float64) @ weight.T)
    if accuracy_level == 0:
        expected = plain
    else:
        expected = group_matmul.reference(x, linear, int8_block=form.block)
        # x · (127 / max) and x / (max / 127) are four roundings apart, 4 · 2^-24 of at most 127.  Only values so close
        # to a half may go to the other integer, one step away: about one in 16000 is, and none was seen to go.
        steps = np.abs(x.astype(np.float64)).reshape(len(x), -1, form.block).max(-1).repeat(form.block, -1) / 127
        scaled = np.abs(x) / np.where(steps == 0, 1, steps)
        near_half = np.abs(scaled % 1 - 0.5) <= 4 * 127 * 2.0**-24
        limit += (steps * near_half) @ weight.T
        assert (np.abs(plain - expected) > limit).mean() > 0.9  # the limit tells rounded activations from others
        # Steps of max|x|/127: about 3 sigma / 127 / sqrt(12) = 7e-3 of x's rms, and so of the result's.
        assert np.sqrt(np.square(got - plain).mean() / np.square(plain).mean()) < 2e-2
    error = np.abs(got.astype(np.float64) - expected)
    print(f"largest error {(error / limit).max():.2f} of its limit")
    assert (error <= limit).all()


@pytest.mark.parametrize(("rows", "width"), [(33, 72), (33, 1001), (32003, 72), (32003, 77)])
@pytest.mark.parametrize("bits", [4, 8])
def test_odd_numbers_of_rows_and_columns(bits: int, rows: int, width: int) -> None:
    spec = QuantSpec(bits, None, False)
    random = np.random.default_rng(rows)
    linear = round_to_nearest(random.standard_normal((rows, width)).astype(np.float32), spec)
    form, x = stored_form(spec, width), random.standard_normal((5, width)).astype(np.float32)
    stored = encode(linear, form)
    assert decode(stored, form.bits, spec, width, "layer").equals(linear)
    exact, fast = (run_matmul(stored, form, x, level).astype(np.float64) for level in (0, 4))
    expected = group_matmul.reference(x, linear)
    size = np.abs(x).astype(np.float64) @ np.abs(linear.dequantize()).astype(np.float64).T
    assert (np.abs(exact - expected) <= width**0.5 * 2.0**-24 * size).all()
    assert np.sqrt(np.square(fast - expected).mean() / np.square(expected).mean()) < 2e-2


def run_matmul(stored: StoredWeight, form: StoredForm, x: np.ndarray, accuracy_level: int) -> np.ndarray:
    constants = {"B": stored.codes, "scales": stored.scales, "zero_points": stored.zero_points}
    known = {name: values for name, values in constants.items() if values is not None}
    node = helper.make_node(
        "MatMulNBits", ["x", *known], ["y"], domain="com.microsoft", K=x.shape[1], N=len(stored.codes),
        bits=form.bits, block_size=form.block, accuracy_level=accuracy_level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [len(x), len(stored.codes)])],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(values), name) for name, values in known.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("symmetric", [True, False])
def test_stacked_weights_come_apart_again(symmetric: bool) -> None:
    spec = QuantSpec(4, 32, symmetric)
    parts, form = [make(spec), make(replace(spec))], stored_form(spec, WIDTH)
    stored = stack([encode(part, form) for part in parts])
    for index, part in enumerate(parts):
        rows = stored.rows(index * ROWS, (index + 1) * ROWS)
        assert decode(rows, form.bits, spec, WIDTH, "layer").equals(part)


def test_tampered_bytes_are_refused_with_the_layer_named() -> None:
    spec = QuantSpec(3, 64, True)
    form = stored_form(spec, WIDTH)
    stored = encode(make(spec), form)
    assert form.bits == 4 and stored.zero_points is not None
    high = replace(stored, codes=stored.codes | np.uint8(0x08))
    other_zero = replace(stored, zero_points=stored.zero_points ^ np.uint8(1))
    not_half = replace(stored, scales=stored.scales + np.float32(1e-6))
    for tampered, reason in ((high, "3 bits"), (other_zero, "midpoint"), (not_half, "float16")):
        with pytest.raises(ArtifactError, match=f"layer: .*{reason}"):
            decode(tampered, form.bits, spec, WIDTH, "layer")
    row = QuantSpec(4, None, True)
    spread = encode(make(row, 512), stored_form(row, 512))
    spread.scales[0, 1] *= 2
    with pytest.raises(ArtifactError, match="differ within a group"):
        decode(spread, 4, row, 512, "layer")


def test_slow_combinations_are_named() -> None:
    for spec, level, word in (
        (QuantSpec(8, 128, True), 0, "dequantizes"),
        (QuantSpec(4, 128, True), 0, "float32"),
        (QuantSpec(4, 16, True), 4, "block 16"),
        (QuantSpec(3, 128, False), 4, "4 bits"),
    ):
        assert word in str(slow(spec, stored_form(spec, WIDTH), level))
    assert slow(QuantSpec(4, 128, True), stored_form(QuantSpec(4, 128, True), WIDTH), 4) is None
