"""Weights as the blocks of 32 that a GGUF file has of integers around zero.

    Q4_0   float16 d, 16 bytes                  w = (q - 8) · d     q in 0 … 15
    Q5_0   float16 d, 4 bytes, 16 bytes         w = (q - 16) · d    q in 0 … 31, fifth bits first
    Q8_0   float16 d, 32 int8                   w = q · d           q in -128 … 127

Byte j of a block's sixteen holds weight j in its low half and weight j + 16 in its high half.

What is stored is code - zero_point, so an asymmetric weight fits in the first of them that holds every difference:
differences of b bits lie in ±(2^b - 1), of 2 and 3 bits in Q4_0, of 4 in Q5_0, of 8 in Q8_0 where they are.  Larger
groups, and whole rows, are blocks with equal scales.  So nothing rounds, and Q4_1 with its float16 minimum, which does,
is not needed.
Source: block_q4_0, block_q5_0 and block_q8_0 in ggml-common.h of llama.cpp.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec

BLOCK = 32
BYTES = {"Q4_0": 18, "Q5_0": 22, "Q8_0": 34}
_MIDDLE = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 0}
_ROWS_VALUES = 1 << 24  # weights that are unpacked at a time


def kind_of(spec: QuantSpec) -> str:
    """The type that holds every code - zero_point of a scheme (of 8 asymmetric bits: most of them)."""
    if spec.bits == 8:
        return "Q8_0"
    return "Q5_0" if spec.bits == 4 and not spec.symmetric else "Q4_0"


def fits(linear: QuantizedLinear) -> bool:
    """Whether a weight's differences lie within its type; only those of 8 asymmetric bits may not."""
    if linear.spec.bits != 8 or linear.spec.symmetric:
        return True
    return all(part.min() >= -128 and part.max() <= 127 for part in map(_differences, _parts(linear)))


def blocks(linear: QuantizedLinear) -> NDArray[np.uint8]:
    """The rows of a weight as blocks.

    Args:
        linear: whose scales are exactly float16, K a multiple of 32 and whose groups are too.

    Returns:
        uint8 [N, K / 32 · bytes of a block].
    """
    kind = kind_of(linear.spec)
    return np.concatenate([_blocks(part, kind) for part in _parts(linear)])


def _parts(linear: QuantizedLinear) -> list[QuantizedLinear]:
    step = max(1, _ROWS_VALUES // linear.in_features)
    return [linear.rows(slice(at, at + step)) for at in range(0, linear.out_features, step)]


def _differences(linear: QuantizedLinear) -> NDArray[np.int16]:
    """What GGUF stores, code - zero_point, [N, K]."""
    codes = linear.unpack().astype(np.int16).reshape(linear.out_features, linear.groups, -1)
    differences: NDArray[np.int16] = codes - linear.full_zero_points().astype(np.int16)[..., None]
    return differences.reshape(linear.out_features, -1)


def _blocks(linear: QuantizedLinear, kind: str) -> NDArray[np.uint8]:
    rows, count = linear.out_features, linear.in_features // BLOCK
    values = (_differences(linear) + _MIDDLE[kind]).reshape(rows, count, BLOCK)
    scales = np.repeat(linear.scales.astype("<f2"), count // linear.groups, axis=1)
    parts: list[NDArray[np.uint8]] = [np.ascontiguousarray(scales[..., None]).view(np.uint8)]
    if kind == "Q8_0":
        parts.append(values.astype(np.int8).view(np.uint8))
    else:
        codes = values.astype(np.uint8)
        if kind == "Q5_0":
            parts.append(np.packbits(codes >> np.uint8(4), axis=-1, bitorder="little"))
        low, high = codes[..., : BLOCK // 2] & 15, codes[..., BLOCK // 2 :] & 15
        parts.append(np.bitwise_or(low, high << np.uint8(4), dtype=np.uint8))
    return np.concatenate(parts, axis=-1).reshape(rows, -1)
