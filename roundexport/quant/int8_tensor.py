"""`Int8Tensor`: a norm's weight or a bias in eight bits, one power of two for the whole tensor.

    value = code · scale        code int8, -128 … 127; scale a power of two (power_of_two.py), one byte in the artifact

Norms and biases are a thousandth of a model's weights, yet at four bits per weight and float32 here they would be a
hundredth of its bytes.  The exponent is the best, by squared error, of the least that clips nothing and its neighbors;
then, where all codes are even, they are halved, so that a tensor that was rounded rounds to the same form again.
Targets expand them to float32, exactly; nothing is rounded again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import SpecError

from . import power_of_two


@dataclass(frozen=True, eq=False)
class Int8Tensor:
    """A float tensor of any shape as integers.

    Args:
        codes: int8.
        scale: a power of two, 2**-64 … 2**63; may be negative.

    Raises:
        SpecError: codes of another dtype, or a scale that is no power of two.
    """

    codes: NDArray[np.int8]
    scale: float

    def __post_init__(self) -> None:
        if self.codes.dtype != np.int8:
            raise SpecError(f"codes must be int8, found {self.codes.dtype}")
        power_of_two.check(np.array([self.scale], np.float32))

    @classmethod
    def nearest(cls, values: NDArray[np.float32]) -> Int8Tensor:
        """Round a finite tensor.

        Raises:
            SpecError: values that are not finite, or so large that no scale holds them.
        """
        values = np.asarray(values, np.float32)
        if not np.isfinite(values).all():
            raise SpecError("values that are not finite cannot be rounded")
        largest = float(np.abs(values).max(initial=0))
        # frexp: largest < 2**exponent, so 128 steps of 2**(exponent - 7) hold it; one power less clips.
        least = max(int(np.frexp(np.float32(largest))[1]) - 8, power_of_two.LEAST)
        candidates = [
            _rounded(values, exponent) for exponent in range(least, least + 3) if exponent <= power_of_two.MOST
        ]
        if not candidates:
            raise SpecError(f"values up to {largest:g} are too large for eight bits")
        return min(candidates, key=lambda vector: vector.squared_error(values))._halved()

    def values(self) -> NDArray[np.float32]:
        """The tensor as float32; exact."""
        return self.codes.astype(np.float32) * np.float32(self.scale)

    def _halved(self) -> Int8Tensor:
        """The same values with the greatest scale that holds them; zeros have scale 1."""
        bits = np.bitwise_or.reduce(self.codes.astype(np.int16), axis=None)
        if not bits:
            return Int8Tensor(self.codes, 1.0)
        shift = int(bits & -bits).bit_length() - 1
        return Int8Tensor((self.codes >> shift).astype(np.int8), self.scale * 2.0**shift)

    def squared_error(self, values: NDArray[np.float32]) -> float:
        """Sum of squared differences from ``values``."""
        return float(np.square(self.values().astype(np.float64) - values).sum())


def _rounded(values: NDArray[np.float32], exponent: int) -> Int8Tensor:
    scale = 2.0**exponent
    return Int8Tensor(np.clip(np.rint(values / np.float32(scale)), -128, 127).astype(np.int8), scale)
