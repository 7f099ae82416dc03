"""Scales that are powers of two, and the one byte each is stored in (``scale_dtype`` "exponent8").

    scale = sign · 2**exponent        exponent -64 … 63
    byte  = 128·(scale < 0) + exponent + 64

Every byte is a scale and every such scale has one byte; there is no zero.  In memory scales are float32, which holds
all of them exactly.  The nearest power of two is taken in the logarithm, sign · 2**round(log2 |s|): the mantissa of s,
between 1/2 and 1, is held against sqrt(1/2), so numpy and torch (kernels/fake_quant.py) agree to the bit.

Tuning keeps to the exponents that float16 holds exactly, -24 … 15, so that a target may write float16 scales.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import SpecError

LEAST, MOST = -64, 63  # exponents a byte holds
LEAST_TUNED, MOST_TUNED = -24, 15  # exponents that float16 holds exactly
ROOT_HALF = float(np.float32(0.5**0.5))  # the last float32 below it: mantissas up to here belong to the lower power


def to_bytes(scales: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Bytes of scales, any shape.

    Raises:
        SpecError: a value that is no power of two, or one beyond 2**-64 … 2**63.
    """
    check(scales)
    _, exponent = np.frexp(scales)
    stored: NDArray[np.uint8] = (np.where(scales < 0, 128, 0) + (exponent - 1 - LEAST)).astype(np.uint8)
    return stored


def from_bytes(stored: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Scales float32 of bytes, any shape."""
    magnitude = np.ldexp(np.float32(1), (stored & 127).astype(np.int32) + LEAST)
    return np.where(stored < 128, magnitude, -magnitude)


def check(scales: NDArray[np.float32]) -> None:
    """Refuse what :func:`to_bytes` cannot hold.

    Raises:
        SpecError: a value that is no power of two, or one beyond 2**-64 … 2**63.
    """
    mantissa, exponent = np.frexp(scales)
    good = (np.abs(mantissa) == 0.5) & (exponent > LEAST) & (exponent <= MOST + 1)
    if not good.all():
        wrong = float(scales[~good].reshape(-1)[0])
        raise SpecError(f"the scale {wrong!r} is no power of two from 2**{LEAST} to 2**{MOST}")


def nearest(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Nearest powers of two, by ratio; float32, any shape.

    Zero and what lies below float16's least gives 2**-24, with the sign where there is one.  What lies beyond 2**15
    gives infinity, which no spec accepts: a group that would need it is refused, not clipped.
    """
    mantissa, exponent = np.frexp(values)
    power = exponent - (np.abs(mantissa) <= np.float32(ROOT_HALF))
    magnitude = np.ldexp(np.float32(1), np.clip(power, LEAST_TUNED, MOST_TUNED))
    magnitude = np.where(values == 0, np.float32(2.0**LEAST_TUNED), magnitude)
    magnitude = np.where((power > MOST_TUNED) | ~np.isfinite(values), np.float32(np.inf), magnitude)
    return np.where(values < 0, -magnitude, magnitude).astype(np.float32)
