"""Packing: golden bytes of the layout, its definition as a bit stream, and properties over random codes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from roundexport.errors import SpecError
from roundexport.quant.packing import pack_codes, unpack_codes

GOLDEN = {
    # 0 | 1<<2 | 2<<4 | 3<<6 = 0xe4; 3, 0, 0, 2 -> 3 | 2<<6 = 0x83; one code left over, high bits zero
    2: ([0, 1, 2, 3, 3, 0, 0, 2, 1], "e4 83 01"),
    # bit stream, code 2 across bytes 0 and 1: 0 1 2 3 4 5 6 7 -> sum(k << 3k) = 0xfac688; then 5 -> 0x05
    3: ([0, 1, 2, 3, 4, 5, 6, 7, 5], "88 c6 fa 05"),
    # low nibble first; odd width leaves the last high nibble zero
    4: ([7, 8, 15, 0, 9], "87 0f 09"),
    8: ([0, 1, 254, 255], "00 01 fe ff"),
}


@pytest.mark.parametrize("bits", sorted(GOLDEN))
def test_golden_bytes(bits: int) -> None:
    codes, expected = GOLDEN[bits]
    array = np.array([codes], np.uint8)
    packed = pack_codes(array, bits)
    assert packed.tobytes().hex(" ") == expected
    assert np.array_equal(unpack_codes(packed, bits, len(codes)), array)


def test_rows_start_on_whole_bytes() -> None:
    packed = pack_codes(np.array([[1, 2, 3], [4, 5, 6]], np.uint8), 4)
    assert packed.tobytes().hex(" ") == "21 03 54 06"


def test_an_int4_byte_is_the_code_byte_with_both_sign_bits_flipped() -> None:
    # codes 0…15 mean -8…7 when symmetric: two's complement nibble = code ^ 8, so byte ^ 0x88
    codes = np.arange(16, dtype=np.uint8)[None]
    signed = (codes.astype(np.int8) - 8) & 0x0F
    assert np.array_equal(pack_codes(codes, 4) ^ 0x88, pack_codes(signed.astype(np.uint8), 4))


def _by_definition(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The module's definition spelled out bit by bit: code k occupies bits k·b … k·b+b-1 of a little-endian stream."""
    rows = []
    for row in codes.tolist():
        stream = sum(code << (k * bits) for k, code in enumerate(row))
        rows.append(np.frombuffer(stream.to_bytes((len(row) * bits + 7) // 8, "little"), np.uint8))
    return np.stack(rows)


@st.composite
def _codes(draw: st.DrawFn) -> tuple[NDArray[np.uint8], int]:
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 70))
    seed = draw(st.integers(0, 2**32 - 1))
    return np.random.default_rng(seed).integers(0, 1 << bits, (rows, width)).astype(np.uint8), bits


@settings(max_examples=200, deadline=None)
@given(_codes())
def test_packing_follows_its_definition_and_unpacks(case: tuple[NDArray[np.uint8], int]) -> None:
    codes, bits = case
    packed = pack_codes(codes, bits)
    assert np.array_equal(packed, _by_definition(codes, bits))
    assert packed.dtype == np.uint8
    assert packed.flags.c_contiguous
    assert np.array_equal(unpack_codes(packed, bits, codes.shape[1]), codes)


@settings(max_examples=50, deadline=None)
@given(_codes())
def test_packing_does_not_depend_on_memory_layout_and_copies(case: tuple[NDArray[np.uint8], int]) -> None:
    codes, bits = case
    packed = pack_codes(codes, bits)
    assert np.array_equal(pack_codes(np.asfortranarray(codes), bits), packed)
    before = packed.copy()
    codes[:] = 0
    assert np.array_equal(packed, before)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_code_out_of_range_is_refused(bits: int) -> None:
    with pytest.raises(SpecError, match=f"code {1 << bits} does not fit in {bits} bits"):
        pack_codes(np.array([[0, 1 << bits]], np.uint8), bits)


def test_wrong_dtype_shape_bits_and_length_are_refused() -> None:
    codes = np.zeros((2, 8), np.uint8)
    with pytest.raises(SpecError, match="bits 5 is not supported"):
        pack_codes(codes, 5)
    with pytest.raises(SpecError, match="must be uint8 with two dimensions, found int64"):
        pack_codes(codes.astype(np.int64), 4)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="two dimensions"):
        pack_codes(codes[0], 4)
    with pytest.raises(SpecError, match="9 codes of 4 bits take 5 bytes a row, found 4"):
        unpack_codes(pack_codes(codes, 4), 4, 9)
