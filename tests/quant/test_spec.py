"""QuantSpec and LinearInfo: what they refuse, and the sizes they compute."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from roundexport.errors import SpecError
from roundexport.quant.spec import BITS, GROUP_SIZES, LinearInfo, QuantSpec, ScaleDtype


@pytest.mark.parametrize("bits", [0, 1, 5, 6, 7, 16, -4, True, 4.5, "4"])
def test_unknown_bits_are_refused(bits: Any) -> None:
    with pytest.raises(SpecError, match=r"bits .* is not supported; use one of 2, 3, 4, 8"):
        QuantSpec(bits=bits)


@pytest.mark.parametrize("group_size", [0, 8, 48, 512, -1, True, "128"])
def test_unknown_group_sizes_are_refused(group_size: Any) -> None:
    with pytest.raises(SpecError, match=r"group_size .* is not supported; use one of 16, 32"):
        QuantSpec(group_size=group_size)


def test_other_values_of_wrong_type_are_refused() -> None:
    with pytest.raises(SpecError, match="symmetric must be true or false, not 1"):
        QuantSpec(symmetric=1)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="scale_dtype 'bfloat16' is not supported"):
        QuantSpec(scale_dtype="bfloat16")  # type: ignore[arg-type]


@pytest.mark.parametrize(("bits", "largest", "midpoint"), [(2, 3, 2), (3, 7, 4), (4, 15, 8), (8, 255, 128)])
def test_code_range(bits: int, largest: int, midpoint: int) -> None:
    spec = QuantSpec(bits=bits)
    assert (spec.max_code, spec.midpoint) == (largest, midpoint)


@pytest.mark.parametrize(("bits", "width", "expected"), [(2, 5, 2), (3, 8, 3), (3, 3, 2), (4, 7, 4), (8, 7, 7)])
def test_a_row_is_whole_bytes(bits: int, width: int, expected: int) -> None:
    assert QuantSpec(bits=bits).row_bytes(width) == expected


def test_groups_per_row() -> None:
    assert QuantSpec(group_size=32).groups(96) == 3
    assert QuantSpec(group_size=None).groups(11_041) == 1
    assert QuantSpec(group_size=None).group_width(77) == 77
    assert QuantSpec(group_size=32).group_width(96) == 32


def test_a_group_size_that_does_not_divide_names_layer_and_remedy() -> None:
    with pytest.raises(SpecError, match="group_size 128 does not divide K=11040; use 16 or 32, none") as caught:
        QuantSpec(group_size=128).groups(11_040, "model.layers.3.mlp.down_proj")
    assert str(caught.value).startswith("model.layers.3.mlp.down_proj: ")
    with pytest.raises(SpecError, match=r"use none \(whole row\) or keep it float"):
        QuantSpec(group_size=16).groups(11_041)


@pytest.mark.parametrize("width", [0, -128])
def test_a_width_that_is_not_positive_is_refused(width: int) -> None:
    with pytest.raises(SpecError, match="is not a positive number of input features"):
        QuantSpec(group_size=None).groups(width, "x")


def test_storage_counts_codes_scales_and_zero_points() -> None:
    # [2, 64] at 4 bits in groups of 32: 128 codes of 4 bits; 2 rows x 2 groups of 16-bit scales, and zero points alike.
    assert QuantSpec(4, 32, True).storage_bits(2, 64) == 128 * 4 + 4 * 16
    assert QuantSpec(4, 32, False).storage_bits(2, 64) == 128 * 4 + 4 * (16 + 4)
    assert QuantSpec(4, 32, True, "float32").storage_bits(2, 64) == 128 * 4 + 4 * 32
    assert QuantSpec(4, 32, True, "exponent8").storage_bits(2, 64) == 128 * 4 + 4 * 8
    assert QuantSpec(4, None, False, "exponent8").storage_bits(2, 64) == 128 * 4 + 2 * (8 + 4)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [*GROUP_SIZES, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", get_args(ScaleDtype))
def test_json_round_trip(bits: int, group_size: int | None, symmetric: bool, scale_dtype: ScaleDtype) -> None:
    spec = QuantSpec(bits, group_size, symmetric, scale_dtype)
    assert QuantSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize("change", [{"extra": 1}, {"bits": None}, {"bits": 5}])
def test_json_with_other_keys_or_values_is_refused(change: dict[str, Any]) -> None:
    data = {**QuantSpec().to_json(), **change}
    with pytest.raises(SpecError):
        QuantSpec.from_json(data)
    with pytest.raises(SpecError, match="has exactly the keys"):
        QuantSpec.from_json({"bits": 4})
    with pytest.raises(SpecError, match="has exactly the keys"):
        QuantSpec.from_json([4])


def test_describe_is_short_and_tells_the_scheme() -> None:
    assert QuantSpec(4, 128, True).describe() == "int4 g128 sym"
    assert QuantSpec(2, None, False).describe() == "int2 row asym"
    assert QuantSpec(4, 32, True, "exponent8").describe() == "int4 g32 sym 2^k"


def test_linear_info_is_hashable_and_defaults_to_an_unshared_linear() -> None:
    info = LinearInfo("a", 8, 4)
    assert (info.kind, info.shared_with) == ("linear", ())
    assert len({info, LinearInfo("a", 8, 4)}) == 1
