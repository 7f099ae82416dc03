"""Codes in 32-bit words against words packed one code at a time."""

from __future__ import annotations

import numpy as np
import pytest
from foreign_checkpoints import words

from roundexport.errors import SpecError
from roundexport.quant.packing import pack_codes
from roundexport.quant.word_packing import (
    AWQ_PLACES,
    awq_ordered,
    stream_of_columns,
    stream_of_rows,
    unpack_stream,
    words_of_stream,
)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("width", [32, 40, 96])
def test_streams_are_words_packed_one_code_at_a_time(bits: int, width: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (5, width)).astype(np.uint8)
    packed = words(codes, bits)
    assert np.array_equal(unpack_stream(stream_of_rows(packed), bits, width), codes)
    assert np.array_equal(unpack_stream(stream_of_columns(packed.T), bits, width), codes)
    assert np.array_equal(words_of_stream(stream_of_rows(packed)), packed)
    if bits in (2, 3, 4, 8):
        assert np.array_equal(words_of_stream(pack_codes(codes, bits)), packed)


def test_awqs_order_puts_column_j_of_eight_at_its_place() -> None:
    columns = np.arange(16, dtype=np.uint8)[None]
    stored = np.empty_like(columns)
    for column, place in enumerate(AWQ_PLACES):
        stored[0, [place, 8 + place]] = column, 8 + column
    assert np.array_equal(awq_ordered(stored), columns)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SpecError, match="do not fit in rows of 4 bytes"):
        unpack_stream(np.zeros((1, 4), np.uint8), 3, 11)
    with pytest.raises(SpecError, match="12 are not a multiple"):
        awq_ordered(np.zeros((1, 12), np.uint8))
