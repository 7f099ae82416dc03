"""Compressed weight chains: bytes, numbers, and that the CPU plugin keeps them compressed."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset15 as ops
from openvino_tools import EXACT, layer_types, round_to_nearest, stored_in
from warm_python import WarmPython

from roundexport.errors import UsageError, WontFitError
from roundexport.kernels import group_matmul
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import LinearInfo, QuantSpec
from roundexport.storage.atomic import write_folder
from roundexport.targets.openvino import OpenVinoSettings, constant_file, constants, refusal
from roundexport.targets.openvino.constants import code_bytes, exact_constant, needs_zero_point, stored_type
from roundexport.targets.openvino.weight import compressed_chain


def consumer_model(linear: QuantizedLinear, stored: str, *, gather: bool) -> ov.Model:
    """x @ weight.T, and beside it rows of the same chain where `gather` says so."""
    weight = compressed_chain(linear, stored, "layer.weight")
    x = ops.parameter([-1, linear.in_features], np.float32, name="x")
    ids = ops.parameter([-1], np.int32, name="ids")
    product = ops.matmul(x, weight, False, True)
    if not gather:
        return ov.Model([product], [x], "linear")
    return ov.Model([product, ops.gather(weight, ids, ops.constant(np.int64(0)))], [x, ids], "tied")


def assert_reference_product(got: np.ndarray, x: np.ndarray, linear: QuantizedLinear) -> None:
    """What `group_matmul` has, but for float32 sums.

    Each of the K roundings of a sum is at most 2^-24 of Σ|x·w|; as a random walk they add up to sqrt(K) of them.
    """
    size = np.abs(x).astype(np.float64) @ np.abs(linear.dequantize()).astype(np.float64).T
    error = np.abs(got.astype(np.float64) - group_matmul.reference(x, linear))
    limit = linear.in_features**0.5 * 2.0**-24 * size
    print(f"largest error {(error / limit).max():.2f} of its limit")
    assert (error <= limit).all()


@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [16, 64, None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_every_scheme_is_exact_and_stays_compressed(kind, bits, group_size, symmetric, scale_dtype) -> None:
    rng = np.random.default_rng(bits)
    weight = rng.standard_normal((33, 192)).astype(np.float32)
    linear = round_to_nearest(weight, QuantSpec(bits, group_size, symmetric, scale_dtype))
    stored = stored_type(linear.spec, linear.in_features, kind)
    compiled = ov.Core().compile_model(consumer_model(linear, stored, gather=kind == "embedding"), "CPU", EXACT)
    x, ids = rng.standard_normal((5, 192)).astype(np.float32), np.array([0, 7, 32], np.int32)
    results = list(compiled([x, ids] if kind == "embedding" else [x]).values())
    expected = linear.dequantize()
    assert_reference_product(results[0], x, linear)
    if kind == "embedding":
        np.testing.assert_array_equal(results[1], expected[ids])  # one product of the same floats
    nodes = layer_types(compiled)
    for node in (*nodes["FullyConnected"], *nodes.get("Gather", [])):
        assert stored in stored_in(node)


@pytest.mark.parametrize("in_features", [77, 78, 90])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rows_that_do_not_fill_whole_bytes_give_the_right_numbers(bits: int, in_features: int) -> None:
    rng = np.random.default_rng(in_features)
    weight = rng.standard_normal((21, in_features)).astype(np.float32)
    for symmetric in (True, False):
        linear = round_to_nearest(weight, QuantSpec(bits, None, symmetric))
        stored = stored_type(linear.spec, in_features)
        compiled = ov.Core().compile_model(consumer_model(linear, stored, gather=False), "CPU", EXACT)
        x = rng.standard_normal((4, in_features)).astype(np.float32)
        assert_reference_product(compiled([x])[0], x, linear)
        assert stored in stored_in(layer_types(compiled)["FullyConnected"][0])


@pytest.mark.parametrize(("rows", "in_features"), [(33, 72), (33, 1001), (32003, 72), (32003, 77)])
@pytest.mark.parametrize("bits", [4, 8])
def test_odd_numbers_of_rows_and_columns(bits: int, rows: int, in_features: int) -> None:
    rng = np.random.default_rng(rows)
    linear = round_to_nearest(rng.standard_normal((rows, in_features)).astype(np.float32), QuantSpec(bits, None, False))
    stored = stored_type(linear.spec, in_features, "embedding")
    compiled = ov.Core().compile_model(consumer_model(linear, stored, gather=True), "CPU", EXACT)
    x, ids = rng.standard_normal((5, in_features)).astype(np.float32), np.array([0, 31, rows - 1], np.int32)
    product, looked_up = compiled([x, ids]).values()
    assert_reference_product(product, x, linear)
    np.testing.assert_array_equal(looked_up, linear.dequantize()[ids])


@pytest.mark.parametrize(
    ("spec", "in_features", "kind", "device", "stored"),
    [
        (QuantSpec(2, 32, True), 64, "linear", "cpu", "u2"),
        (QuantSpec(2, 32, False), 64, "linear", "cpu", "u2"),
        (QuantSpec(2, 32, True), 64, "linear", "gpu", "i4"),
        (QuantSpec(2, 32, False), 64, "linear", "gpu", "u4"),
        (QuantSpec(2, 32, False), 64, "embedding", "cpu", "u4"),
        (QuantSpec(2, None, True), 78, "linear", "cpu", "i4"),
        (QuantSpec(3, 32, True), 64, "linear", "cpu", "i4"),
        (QuantSpec(3, 32, False), 64, "linear", "cpu", "u4"),
        (QuantSpec(4, 32, True), 64, "linear", "cpu", "i4"),
        (QuantSpec(4, 32, False), 64, "embedding", "gpu", "u4"),
        (QuantSpec(4, None, True), 77, "linear", "cpu", "i8"),
        (QuantSpec(4, None, False), 77, "linear", "cpu", "u8"),
        (QuantSpec(8, None, True), 64, "linear", "cpu", "i8"),
        (QuantSpec(8, None, False), 64, "linear", "cpu", "u8"),
    ],
)
def test_stored_type(spec, in_features, kind, device, stored) -> None:
    assert stored_type(spec, in_features, kind, device) == stored


def test_only_symmetric_signed_types_need_no_zero_point() -> None:
    assert not needs_zero_point(QuantSpec(4, 32, True), "i4")
    assert not needs_zero_point(QuantSpec(3, 32, True), "i4")
    assert needs_zero_point(QuantSpec(2, 32, True), "u2")
    assert needs_zero_point(QuantSpec(4, 32, False), "u4")


@pytest.mark.parametrize(
    ("bits", "stored", "expected"),
    [
        (4, "u4", [0x10, 0x98]),  # codes 0 1 8 9, low nibble first
        (4, "i4", [0x98, 0x10]),  # the same minus 8: -8 -7 0 1
        (8, "u8", [0, 1, 8, 9]),
        (8, "i8", [0x80, 0x81, 0x88, 0x89]),
    ],
)
def test_golden_bytes(bits: int, stored: str, expected: list[int]) -> None:
    codes = np.array([[0, 1, 8, 9]], np.uint8)
    linear = QuantizedLinear.from_unpacked(QuantSpec(bits, None, True), codes, np.ones((1, 1), np.float16))
    assert code_bytes(linear, stored).tolist() == expected


def test_golden_bytes_of_three_and_two_bits() -> None:
    three = QuantizedLinear.from_unpacked(
        QuantSpec(3, None, True), np.array([[0, 4, 7, 3]], np.uint8), np.ones((1, 1), np.float16)
    )
    assert code_bytes(three, "i4").tolist() == [0x0C, 0xF3]  # -4 0 3 -1
    two = QuantizedLinear.from_unpacked(
        QuantSpec(2, None, True), np.array([[0, 1, 2, 3]], np.uint8), np.ones((1, 1), np.float16)
    )
    assert code_bytes(two, "u2").tolist() == [0b11100100]
    assert code_bytes(two, "i4").tolist() == [0xFE, 0x10]  # -2 -1 0 1


def test_float_weights_are_stored_in_the_smallest_type_that_is_exact() -> None:
    half = np.array([[1.5, -0.25]], np.float32)
    brain = np.array([[1.5, 2.0**100]], np.float32)  # beyond float16, exact in bfloat16
    full = np.array([[1.5, 1.0 + 2.0**-20]], np.float32)
    for values, kind in ((half, "f16"), (brain, "bf16"), (full, "f32")):
        constant = exact_constant(values, "w")
        assert constant.get_element_type().get_type_name() == kind
        compiled = ov.Core().compile_model(ov.Model([ops.convert(constant, "f32")], [], "m"), "CPU", EXACT)
        np.testing.assert_array_equal(compiled([])[0], values)


def test_a_constant_owns_its_bytes() -> None:
    spec = QuantSpec(4, 32, True)
    expected = [
        round_to_nearest(np.random.default_rng(i).standard_normal((64, 64), np.float32), spec) for i in range(8)
    ]
    chains = [compressed_chain(linear, "i4", f"w{i}") for i, linear in enumerate(expected)]
    junk = [np.full(4096, 0x55, np.uint8) for _ in range(64)]  # would overwrite freed buffers
    compiled = ov.Core().compile_model(ov.Model(chains, [], "m"), "CPU", EXACT)
    for result, linear in zip(compiled([]).values(), expected, strict=True):
        np.testing.assert_array_equal(result, linear.dequantize())
    assert len(junk) == 64


def test_a_weight_of_one_row_is_refused() -> None:
    reason = refusal(LinearInfo("score", 64, 1), QuantSpec(4, 32))
    assert reason is not None and "keep it float" in reason
    assert refusal(LinearInfo("q_proj", 64, 64), QuantSpec(2, 32)) is None


@pytest.mark.parametrize("bad", [{"device": "npu"}, {"max_context": 0}])
def test_impossible_settings_are_usage_errors(bad) -> None:
    with pytest.raises(UsageError, match=str(next(iter(bad.values())))):
        OpenVinoSettings(**bad)


ANONYMOUS = """
import sys
import numpy as np
from roundexport.targets.openvino.constant_file import constants_in
from roundexport.targets.openvino.constants import exact_constant, float_constant, packed_constant

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) >> 10

codes = np.arange(24 << 20, dtype=np.uint8)
brain = (np.arange(8 << 20, dtype=np.uint32) << 16).view(np.float32).reshape(-1, 1024)
brain[~np.isfinite(brain)] = 1
with constants_in(sys.argv[1]):
    before = anonymous()
    held = [packed_constant("u4", (12, 1 << 22), codes, "codes") for _ in range(6)]
    print(anonymous() - before < 24)
    held.append(exact_constant(brain, "table"))
    held.append(float_constant(np.ones((3, 1 << 16), np.float16), "scale"))
    print(all((node.data.reshape(-1).view(np.uint8) == codes).all() for node in held[:6]))
    print((held[6].get_element_type().get_type_name(), bool((held[7].data == 1).all())))
    words = held[6].data.view(np.uint16).reshape(-1)
    print((words == (brain.view(np.uint32).reshape(-1) >> 16)).all())
    del held
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process's own memory from files")
def test_constants_lie_in_a_file_and_not_in_memory(tmp_path: Path, warm: WarmPython) -> None:
    done = warm.run(ANONYMOUS, tmp_path)
    assert done.stdout == "True\nTrue\n('bf16', True)\nTrue\n", done.stdout + done.stderr[-3000:]
    assert not list(tmp_path.iterdir())


def test_a_disk_that_cannot_hold_constants_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with (
        pytest.raises(WontFitError, match=f"the disk is full: could not write {tmp_path / 'package'} "),
        write_folder(tmp_path / "package") as aside,
        constant_file.constants_in(aside),
    ):
        constants.float_constant(np.ones(1 << 16, np.float32), "scale")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("free", [1 << 40, 1 << 10])
def test_constants_lie_in_a_file_where_the_system_reserves_no_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    values = np.arange(1 << 16, dtype=np.float32)
    with constant_file.constants_in(tmp_path):
        if free < constant_file.SEGMENT:
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                constants.float_constant(values, "scale")
        else:
            np.testing.assert_array_equal(constants.float_constant(values, "scale").data, values)
