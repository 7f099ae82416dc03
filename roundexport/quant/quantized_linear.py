"""`QuantizedLinear`: the one canonical form between tuning and export.

Tuners make it, the artifact stores it, targets lower it, verify reads it back and compares.  Nothing rounds after this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import SpecError

from . import power_of_two
from .packing import pack_codes, unpack_codes
from .spec import QuantSpec


@dataclass(frozen=True, eq=False)
class QuantizedLinear:
    """One weight [N, K] as integers, scales and zero points.

    Args:
        spec: the scheme.
        in_features: K, codes per row before packing.
        codes: uint8 [N, ceil(K·bits/8)], packed as in :mod:`roundexport.quant.packing`.
        scales: [N, G], finite, may be negative; float16 or float32, zero or not, and where the spec's scale_dtype is
            exponent8 float32 powers of two.
        zero_points: uint8 [N, G], each at most ``spec.max_code``; None exactly when symmetric.

    Raises:
        SpecError: shapes, dtypes or ranges contradict the spec.
    """

    spec: QuantSpec
    in_features: int
    codes: NDArray[np.uint8]
    scales: NDArray[np.floating]
    zero_points: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        rows = self.codes.shape[0] if self.codes.ndim == 2 else -1
        groups = self.spec.groups(self.in_features)
        _expect("codes", self.codes, "uint8", (rows, self.spec.row_bytes(self.in_features)))
        _expect("scales", self.scales, self.spec.scale_array, (rows, groups))
        if not np.isfinite(self.scales).all():
            raise SpecError("scales hold values that are not finite")
        if self.spec.scale_dtype == "exponent8":
            power_of_two.check(self.scales)
        if self.spec.symmetric != (self.zero_points is None):
            raise SpecError("zero_points must be absent exactly when the spec is symmetric")
        if self.zero_points is not None:
            _expect("zero_points", self.zero_points, "uint8", (rows, groups))
            if self.zero_points.size and int(self.zero_points.max()) > self.spec.max_code:
                raise SpecError(f"zero point {int(self.zero_points.max())} does not fit in {self.spec.bits} bits")

    @classmethod
    def from_unpacked(
        cls,
        spec: QuantSpec,
        codes: NDArray[np.uint8],
        scales: NDArray[np.floating],
        zero_points: NDArray[np.uint8] | None = None,
    ) -> QuantizedLinear:
        """Pack unpacked codes, uint8 [N, K], into the canonical form."""
        return cls(spec, codes.shape[1], pack_codes(codes, spec.bits), scales, zero_points)

    @classmethod
    def concatenate_rows(cls, parts: Sequence[QuantizedLinear]) -> QuantizedLinear:
        """One weight [ΣN, K] from parts that share scheme and K, in their order.

        Raises:
            SpecError: no parts, or parts of different schemes or widths.
        """
        kinds = {(part.spec, part.in_features) for part in parts}
        if len(kinds) != 1:
            raise SpecError(f"rows of {len(kinds)} different schemes or widths do not make one weight")
        if len(parts) == 1:
            return parts[0]
        ((spec, width),) = kinds
        zero = None if spec.symmetric else np.concatenate([part.full_zero_points() for part in parts])
        codes, scales = (np.concatenate([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
        return cls(spec, width, codes, scales, zero)

    def rows(self, rows: slice | NDArray[np.integer]) -> QuantizedLinear:
        """Some rows, as a weight of their own."""
        zero = None if self.zero_points is None else self.zero_points[rows]
        return QuantizedLinear(self.spec, self.in_features, self.codes[rows], self.scales[rows], zero)

    @property
    def out_features(self) -> int:
        """N, rows."""
        return int(self.codes.shape[0])

    @property
    def groups(self) -> int:
        """G, groups per row."""
        return int(self.scales.shape[1])

    @property
    def storage_bits(self) -> int:
        """All bits stored: codes, scales, zero points."""
        return self.spec.storage_bits(self.out_features, self.in_features)

    def unpack(self) -> NDArray[np.uint8]:
        """Codes unpacked, uint8 [N, K]."""
        return unpack_codes(self.codes, self.spec.bits, self.in_features)

    def full_zero_points(self) -> NDArray[np.uint8]:
        """Zero points uint8 [N, G], the midpoint everywhere when symmetric."""
        if self.zero_points is None:
            return np.full(self.scales.shape, self.spec.midpoint, np.uint8)
        return self.zero_points

    def dequantize(self) -> NDArray[np.float32]:
        """The weight that every target must reproduce: ``(code - zero_point) · scale``, float32 [N, K]."""
        codes = self.unpack().reshape(self.out_features, self.groups, -1)
        weight: NDArray[np.float32] = np.subtract(codes, self.full_zero_points()[..., None], dtype=np.float32)
        weight *= self.scales[..., None].astype(np.float32)
        return weight.reshape(self.out_features, self.in_features)

    def equals(self, other: QuantizedLinear) -> bool:
        """Bit-for-bit equality of spec, codes, scales and zero points."""
        if self.spec != other.spec or self.in_features != other.in_features:
            return False
        if not (np.array_equal(self.codes, other.codes) and self.scales.tobytes() == other.scales.tobytes()):
            return False
        return np.array_equal(self.full_zero_points(), other.full_zero_points())


def _expect(what: str, array: NDArray[np.generic], dtype: str, shape: tuple[int, ...]) -> None:
    if array.dtype != np.dtype(dtype) or array.shape != shape:
        raise SpecError(f"{what} must be {dtype} {shape}, found {array.dtype} {array.shape}")
