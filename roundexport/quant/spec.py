"""How a weight matrix is quantized (`QuantSpec`), and what a recipe sees of a layer (`LinearInfo`).

One formula everywhere, for a weight of shape [N, K] cut along K into G groups:

    w ≈ (code - zero_point) · scale        code, zero_point in 0 … 2**bits - 1; scale may be negative

Symmetric fixes zero_point at 2**(bits-1) and stores none.  Limits that belong to one runtime live in that target.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from roundexport.errors import SpecError

ScaleDtype = Literal["float16", "float32", "exponent8"]
LayerKind = Literal["linear", "embedding"]

BITS = (2, 3, 4, 8)
GROUP_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """One quantization scheme.

    Args:
        bits: stored bits per code: 2, 3, 4 or 8.
        group_size: weights along K that share a scale: 16, 32, 64, 128, 256, or None for the whole row.
        symmetric: zero point fixed at ``2**(bits-1)`` and not stored.
        scale_dtype: dtype in which scales are stored: float16, float32, or exponent8, powers of two in one byte each
            (power_of_two.py); codes are taken after the scale was rounded to it.

    Raises:
        SpecError: a value outside these sets.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool | float) or self.bits not in BITS:
            raise SpecError(f"bits {self.bits!r} is not supported; use one of {', '.join(map(str, BITS))}")
        if self.group_size is not None and (
            isinstance(self.group_size, bool | float) or self.group_size not in GROUP_SIZES
        ):
            known = ", ".join(map(str, GROUP_SIZES))
            raise SpecError(f"group_size {self.group_size!r} is not supported; use one of {known}, or none (whole row)")
        if not isinstance(self.symmetric, bool):
            raise SpecError(f"symmetric must be true or false, not {self.symmetric!r}")
        if self.scale_dtype not in get_args(ScaleDtype):
            raise SpecError(f"scale_dtype {self.scale_dtype!r} is not supported; use float16, float32 or exponent8")

    @property
    def max_code(self) -> int:
        """The largest code, ``2**bits - 1``."""
        return (1 << self.bits) - 1

    @property
    def midpoint(self) -> int:
        """The code that means 0.0 when symmetric, ``2**(bits-1)``."""
        return 1 << (self.bits - 1)

    @property
    def scale_array(self) -> Literal["float16", "float32"]:
        """The numpy dtype that holds scales in memory: powers of two are float32 numbers there."""
        return "float16" if self.scale_dtype == "float16" else "float32"

    @property
    def scale_bits(self) -> int:
        """Bits of one stored scale."""
        return {"float16": 16, "float32": 32, "exponent8": 8}[self.scale_dtype]

    def row_bytes(self, in_features: int) -> int:
        """Bytes of one packed row of ``in_features`` codes; the last byte's unused high bits are zero."""
        return (in_features * self.bits + 7) // 8

    def group_width(self, in_features: int) -> int:
        """Weights per group for this K: ``group_size``, or K when the whole row is one group."""
        return self.group_size or in_features

    def groups(self, in_features: int, where: str = "weight") -> int:
        """Groups per row, G.

        Raises:
            SpecError: group_size does not divide K; the text names ``where`` and the sizes that do.
        """
        if in_features < 1:
            raise SpecError(f"{where}: K={in_features} is not a positive number of input features")
        if self.group_size is None:
            return 1
        if in_features % self.group_size:
            fits = [str(g) for g in GROUP_SIZES if in_features % g == 0]
            advice = f"use {' or '.join(fits)}, none (whole row)," if fits else "use none (whole row)"
            raise SpecError(
                f"{where}: group_size {self.group_size} does not divide K={in_features}; {advice} or keep it float"
            )
        return in_features // self.group_size

    def storage_bits(self, out_features: int, in_features: int) -> int:
        """Stored bits of a [N, K] weight: codes, scales in their dtype, and zero points as wide as a code.

        So packages store codes and zero points, in a wider form where a runtime lacks this one; an artifact spends a
        byte on a zero point.
        """
        per_group = self.scale_bits + (0 if self.symmetric else self.bits)
        return out_features * (8 * self.row_bytes(in_features) + self.groups(in_features) * per_group)

    def describe(self) -> str:
        """Short name such as ``int4 g128 sym``, with ``2^k`` where scales are powers of two."""
        group = "row" if self.group_size is None else f"g{self.group_size}"
        powers = " 2^k" if self.scale_dtype == "exponent8" else ""
        return f"int{self.bits} {group} {'sym' if self.symmetric else 'asym'}{powers}"

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object; :meth:`from_json` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> QuantSpec:
        """Read what :meth:`to_json` wrote.

        Raises:
            SpecError: missing or unknown keys, or a value the class refuses.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            raise SpecError(f"a quantization spec has exactly the keys {sorted(names)}, found {data!r}")
        return cls(**data)


@dataclass(frozen=True, slots=True)
class LinearInfo:
    """What a recipe sees of one weight matrix [N, K].

    Args:
        name: module path in the transformers model, as in ``model.layers.0.self_attn.q_proj``.
        in_features: K, weights per row (for an embedding: the width of a row).
        out_features: N, rows (for an embedding: the vocabulary).
        kind: a linear layer, or an embedding table read by row.
        shared_with: names of other modules that own the very same weight (tied lm_head).
    """

    name: str
    in_features: int
    out_features: int
    kind: LayerKind = "linear"
    shared_with: tuple[str, ...] = ()
