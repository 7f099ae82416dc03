"""Packing of unsigned codes into bytes, least significant bits first.

A row of K codes of b bits is one little-endian bit stream: code k occupies bits k·b … k·b+b-1, and bit i of the stream
is bit i % 8 of byte i // 8.  Rows start on whole bytes; unused high bits of a row's last byte are zero.

    bits 8   one code per byte
    bits 4   code 0 in the low nibble, code 1 in the high one        = MatMulNBits B, OpenVINO u4 (i4 is byte ^ 0x88)
    bits 2   four codes per byte, code 0 in the lowest two bits      = MatMulNBits B, OpenVINO u2
    bits 3   eight codes in three bytes; code 2 lies across two      (no runtime reads it as it stands)

Zero points [N, G] are packed by the same rule when a runtime wants them packed.
Checked against golden bytes and by property tests in tests/quant/test_packing.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import SpecError

Codes = NDArray[np.uint8]


def pack_codes(codes: Codes, bits: int) -> Codes:
    """Pack unsigned codes into bytes.

    Args:
        codes: uint8 [N, K], each below ``2**bits``.
        bits: 2, 3, 4 or 8.

    Returns:
        uint8 [N, ceil(K·bits/8)], C order.

    Raises:
        SpecError: wrong shape, dtype or bits, or a code out of range.
    """
    _check(codes, bits)
    if codes.size and int(codes.max()) >> bits:
        raise SpecError(f"code {int(codes.max())} does not fit in {bits} bits")
    if bits == 8:
        return np.ascontiguousarray(codes).copy()
    rows, width = codes.shape
    unit = _codes_per_unit(bits)
    padded = np.zeros((rows, -(-width // unit) * unit), np.uint8)
    padded[:, :width] = codes
    grouped = padded.reshape(rows, -1, unit)
    words = np.zeros(grouped.shape[:2], np.uint32)
    for position in range(unit):
        words |= grouped[:, :, position].astype(np.uint32) << np.uint32(position * bits)
    unit_bytes = unit * bits // 8
    packed = words.astype("<u4").view(np.uint8).reshape(rows, -1, 4)[:, :, :unit_bytes].reshape(rows, -1)
    return np.ascontiguousarray(packed[:, : (width * bits + 7) // 8])


def unpack_codes(packed: Codes, bits: int, width: int) -> Codes:
    """Invert :func:`pack_codes`.

    Args:
        packed: uint8 [N, ceil(width·bits/8)].
        bits: 2, 3, 4 or 8.
        width: K, codes per row.

    Returns:
        uint8 [N, width], C order.

    Raises:
        SpecError: the row length does not match ``width`` and ``bits``.
    """
    _check(packed, bits)
    rows, row_bytes = packed.shape
    if row_bytes != (width * bits + 7) // 8:
        raise SpecError(f"{width} codes of {bits} bits take {(width * bits + 7) // 8} bytes a row, found {row_bytes}")
    if bits == 8:
        return np.ascontiguousarray(packed).copy()
    unit = _codes_per_unit(bits)
    unit_bytes = unit * bits // 8
    units = -(-width // unit)
    words = np.zeros((rows, units * unit_bytes), np.uint8)
    words[:, :row_bytes] = packed
    wide = np.zeros((rows, units), np.uint32)
    for byte in range(unit_bytes):
        wide |= words.reshape(rows, units, unit_bytes)[:, :, byte].astype(np.uint32) << np.uint32(8 * byte)
    codes = np.empty((rows, units, unit), np.uint8)
    for position in range(unit):
        codes[:, :, position] = (wide >> np.uint32(position * bits)) & np.uint32((1 << bits) - 1)
    return np.ascontiguousarray(codes.reshape(rows, -1)[:, :width])


def _codes_per_unit(bits: int) -> int:
    """Codes in the smallest run that fills whole bytes: 8 for 3 bits (24 bits), else one byte's worth."""
    return 8 if bits == 3 else 8 // bits


def _check(array: Codes, bits: int) -> None:
    if bits not in (2, 3, 4, 8):
        raise SpecError(f"bits {bits!r} is not supported; use one of 2, 3, 4, 8")
    if array.dtype != np.uint8 or array.ndim != 2:
        raise SpecError(f"codes must be uint8 with two dimensions, found {array.dtype} {array.shape}")
