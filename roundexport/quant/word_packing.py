"""Codes in 32-bit words, as GPTQ, AWQ and compressed-tensors store them; both directions, for import and for export.

All of them put codes of b bits one after another from the lowest bit on, into little-endian words.  Along the axis that
is packed such words are therefore the bit stream of packing.py, where K·b is a multiple of 32; also at 3 bits, where a
code lies across two words.  What differs is the axis, and in AWQ's gemm layout the order inside runs of eight:

    GPTQ    qweight [K·b/32, N]  along K         qzeros [G, N·b/32]  along N
    AWQ     qweight [K, N·b/32]  along N, the code of column 8·i + j at place 8·i + AWQ_PLACES[j]; qzeros [G, N·b/32]
            likewise

Source: QuantLinear.pack of AutoGPTQ and GPTQModel, WQLinear_GEMM of AutoAWQ.  Checked against words packed one code at
a time in tests/quant/test_word_packing.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import SpecError

Words = NDArray[np.int32]
Bytes = NDArray[np.uint8]

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
WORD_BITS = 32


def stream_of_columns(words: Words) -> Bytes:
    """Words packed along the first axis [W, N] -> one bit stream per column, uint8 [N, 4·W]."""
    return stream_of_rows(np.ascontiguousarray(words.T))


def stream_of_rows(words: Words) -> Bytes:
    """Words packed along the second axis [N, W] -> one bit stream per row, uint8 [N, 4·W]."""
    return np.ascontiguousarray(words, "<i4").view(np.uint8).reshape(len(words), -1)


def words_of_stream(stream: Bytes) -> Words:
    """Invert :func:`stream_of_rows`; rows are filled up with zeros to whole words."""
    rows, width = stream.shape
    padded = np.zeros((rows, -(-width // 4) * 4), np.uint8)
    padded[:, :width] = stream
    return padded.view("<i4").astype(np.int32, copy=False)


def unpack_stream(stream: Bytes, bits: int, width: int) -> Bytes:
    """Codes of a bit stream of any width from 1 to 8 bits.

    Args:
        stream: uint8 [N, at least ceil(width·bits/8)]; what lies behind the last code is not looked at.
        bits: of a code.
        width: codes per row.

    Returns:
        uint8 [N, width].

    Raises:
        SpecError: the rows are too short.
    """
    if stream.shape[1] * 8 < width * bits:
        raise SpecError(f"{width} codes of {bits} bits do not fit in rows of {stream.shape[1]} bytes")
    codes = np.empty((len(stream), width), np.uint8)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    step = max(1, (1 << 24) // max(1, 8 * stream.shape[1]))  # rows at a time: bits take a byte each
    for start in range(0, len(stream), step):
        single = np.unpackbits(stream[start : start + step], axis=1, count=width * bits, bitorder="little")
        codes[start : start + step] = single.reshape(len(single), width, bits) @ weights
    return codes


def awq_ordered(codes: Bytes) -> Bytes:
    """Codes [K, N] as they lie in AWQ's words -> in the order of the columns.

    Raises:
        SpecError: N is not a multiple of 8.
    """
    return _runs(codes)[:, :, list(AWQ_PLACES)].reshape(codes.shape)


def awq_places(codes: Bytes) -> Bytes:
    """Invert :func:`awq_ordered`: codes [K, N] in the order of the columns -> as they lie in AWQ's words.

    Raises:
        SpecError: N is not a multiple of 8.
    """
    runs = _runs(codes)
    placed = np.empty_like(runs)
    placed[:, :, list(AWQ_PLACES)] = runs
    return placed.reshape(codes.shape)


def _runs(codes: Bytes) -> Bytes:
    rows, width = codes.shape
    if width % len(AWQ_PLACES):
        raise SpecError(f"AWQ's order is one of runs of 8 columns, of which {width} are not a multiple")
    return codes.reshape(rows, -1, len(AWQ_PLACES))
