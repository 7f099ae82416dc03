"""QuantizedLinear: the reference formula, its checks, and bit-for-bit equality."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from roundexport.errors import SpecError
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec


def _random(spec: QuantSpec, rows: int, width: int, seed: int = 0) -> QuantizedLinear:
    rng = np.random.default_rng(seed)
    grid = (rows, spec.groups(width))
    codes = rng.integers(0, spec.max_code + 1, (rows, width)).astype(np.uint8)
    scales = rng.standard_normal(grid).astype(spec.scale_dtype)
    zero_points = None if spec.symmetric else rng.integers(0, spec.max_code + 1, grid).astype(np.uint8)
    return QuantizedLinear.from_unpacked(spec, codes, scales, zero_points)


def test_the_formula_by_hand() -> None:
    codes = np.zeros((1, 32), np.uint8)
    codes[0, :16] = 15
    scales = np.array([[0.5, -2.0]], np.float16)
    zero_points = np.array([[3, 1]], np.uint8)
    linear = QuantizedLinear.from_unpacked(QuantSpec(4, 16, False), codes, scales, zero_points)
    weight = linear.dequantize()
    assert weight.dtype == np.float32
    assert weight[0, :16].tolist() == [(15 - 3) * 0.5] * 16
    assert weight[0, 16:].tolist() == [(0 - 1) * -2.0] * 16  # a negative scale is as good as any


def test_symmetric_means_the_midpoint() -> None:
    linear = _random(QuantSpec(3, 16, True), 2, 32)
    assert np.array_equal(linear.full_zero_points(), np.full((2, 2), 4, np.uint8))
    explicit = dataclasses.replace(
        linear, spec=dataclasses.replace(linear.spec, symmetric=False), zero_points=linear.full_zero_points()
    )
    assert np.array_equal(linear.dequantize(), explicit.dequantize())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([16, 32, None]),
    st.booleans(),
    st.integers(1, 4),
    st.integers(0, 999),
)
def test_dequantize_equals_the_formula_element_by_element(
    bits: int, group_size: int | None, symmetric: bool, rows: int, seed: int
) -> None:
    linear = _random(QuantSpec(bits, group_size, symmetric), rows, 64, seed)
    width = group_size or 64
    codes, zero_points = linear.unpack().astype(np.int64), linear.full_zero_points().astype(np.int64)
    weight = linear.dequantize()
    for row in range(rows):
        for k in range(0, 64, 7):
            steps = int(codes[row, k] - zero_points[row, k // width])
            # an integer below 2**8 times a float16 fits in float32's 24 bits of mantissa: no tolerance
            assert weight[row, k] == np.float32(steps) * np.float32(linear.scales[row, k // width])


@pytest.mark.parametrize("scale", [1.5, 0.0, 2.0**-65, 2.0**64, 3 * 2.0**-20])
def test_exponent8_takes_powers_of_two_only(scale: float) -> None:
    spec, codes = QuantSpec(4, 16, True, "exponent8"), np.full((1, 32), 9, np.uint8)
    linear = QuantizedLinear.from_unpacked(spec, codes, np.array([[2.0**-64, -(2.0**63)]], np.float32))
    assert linear.dequantize()[0, [0, 31]].tolist() == [2.0**-64, -(2.0**63)]
    with pytest.raises(SpecError, match="no power of two from"):
        QuantizedLinear.from_unpacked(spec, codes, np.array([[1, scale]], np.float32))
    with pytest.raises(SpecError, match="scales must be float32"):
        QuantizedLinear.from_unpacked(spec, codes, np.ones((1, 2), np.float16))


def test_shapes_and_sizes() -> None:
    linear = _random(QuantSpec(3, 16, False), 5, 48)
    assert (linear.out_features, linear.in_features, linear.groups) == (5, 48, 3)
    assert linear.codes.shape == (5, 18)
    assert linear.storage_bits == 5 * (18 * 8 + 3 * (16 + 3))


def test_a_whole_row_group_may_have_any_width() -> None:
    linear = _random(QuantSpec(3, None, True), 2, 13)
    assert linear.codes.shape == (2, 5)
    assert linear.dequantize().shape == (2, 13)


def _broken(**changes: Any) -> dict[str, Any]:
    linear = _random(QuantSpec(4, 16, False), 2, 32)
    return {**{f.name: getattr(linear, f.name) for f in dataclasses.fields(linear)}, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": np.zeros((2, 15), np.uint8)}, r"codes must be uint8 \(2, 16\), found uint8 \(2, 15\)"),
        ({"codes": np.zeros((2, 16), np.int8)}, "codes must be uint8"),
        ({"codes": np.zeros(32, np.uint8)}, "codes must be"),
        ({"scales": np.ones((2, 2), np.float32)}, "scales must be float16"),
        ({"scales": np.ones((2, 1), np.float16)}, "scales must be float16"),
        ({"scales": np.array([[1, np.inf], [1, 1]], np.float16)}, "scales hold values that are not finite"),
        ({"scales": np.array([[1, np.nan], [1, 1]], np.float16)}, "scales hold values that are not finite"),
        ({"zero_points": None}, "absent exactly when the spec is symmetric"),
        ({"zero_points": np.full((2, 2), 16, np.uint8)}, "zero point 16 does not fit in 4 bits"),
        ({"zero_points": np.zeros((2, 3), np.uint8)}, "zero_points must be uint8"),
        ({"in_features": 40}, "group_size 16 does not divide K=40"),
        ({"spec": QuantSpec(4, 16, True)}, "absent exactly when the spec is symmetric"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        QuantizedLinear(**_broken(**changes))


def test_equality_is_bit_for_bit() -> None:
    linear = _random(QuantSpec(4, 16, False), 2, 32)
    assert linear.equals(_random(QuantSpec(4, 16, False), 2, 32))

    def changed(name: str, array: NDArray[Any]) -> QuantizedLinear:
        return dataclasses.replace(linear, **{name: array})

    codes = linear.codes.copy()
    codes[1, 3] ^= 1
    zero_points = linear.full_zero_points().copy()
    zero_points[0, 0] ^= 1
    assert not linear.equals(changed("codes", codes))
    assert not linear.equals(changed("zero_points", zero_points))
    assert not linear.equals(_random(QuantSpec(4, 32, False), 2, 32))


def test_equality_tells_minus_zero_from_zero() -> None:
    linear = _random(QuantSpec(4, None, True), 1, 32)
    zero = dataclasses.replace(linear, scales=np.array([[0.0]], np.float16))
    minus_zero = dataclasses.replace(linear, scales=np.array([[-0.0]], np.float16))
    assert not zero.equals(minus_zero)
