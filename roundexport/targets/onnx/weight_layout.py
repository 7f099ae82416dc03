"""Bytes of a weight between the artifact's form and that of MatMulNBits and GatherBlockQuantized; exact both ways.

    B            uint8 [N, G, block·bits/8]     codes, low bits first; the last block of a row is filled up with zeros
    scales       float32 [N, G]                 float16 ones widened, powers of two as they are
    zero_points  uint8 [N, ceil(G·bits/8)]      packed, low bits first; absent: 2**(bits-1)

For equal bits and a block that divides K, B is the artifact's codes as they are.  Blocks narrower than the artifact's
group repeat its scale and zero point; `decode` refuses bytes in which the repeats differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import ArtifactError, SpecError
from roundexport.quant.packing import pack_codes, unpack_codes
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec

from .kernel_forms import StoredForm


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """One weight as the graph holds it; see the module header."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None

    def rows(self, start: int, stop: int) -> StoredWeight:
        """The same for rows ``start`` … ``stop - 1``."""
        zero_points = None if self.zero_points is None else self.zero_points[start:stop]
        return StoredWeight(self.codes[start:stop], self.scales[start:stop], zero_points)


def encode(linear: QuantizedLinear, form: StoredForm) -> StoredWeight:
    """The bytes of one weight in a form that :func:`roundexport.targets.onnx.kernel_forms.stored_form` chose for it."""
    width, block = linear.in_features, form.block
    blocks = -(-width // block)
    if linear.spec.bits == form.bits and blocks * block == width:
        codes = np.ascontiguousarray(linear.codes)
    else:
        padded = np.zeros((linear.out_features, blocks * block), np.uint8)
        padded[:, :width] = linear.unpack()
        codes = pack_codes(padded, form.bits)
    repeats = blocks // linear.groups
    scales = np.repeat(linear.scales.astype(np.float32), repeats, axis=1)
    zero_points = None
    if form.zero_points:
        zero_points = pack_codes(np.repeat(linear.full_zero_points(), repeats, axis=1), form.bits)
    return StoredWeight(codes.reshape(linear.out_features, blocks, block * form.bits // 8), scales, zero_points)


def stack(weights: Sequence[StoredWeight]) -> StoredWeight:
    """Several weights of one form and K, one below the other: the rows are independent, so this is exact."""
    if len(weights) == 1:
        return weights[0]
    points = [weight.zero_points for weight in weights if weight.zero_points is not None]
    return StoredWeight(
        np.concatenate([weight.codes for weight in weights]),
        np.concatenate([weight.scales for weight in weights]),
        np.concatenate(points) if points else None,
    )


def decode(stored: StoredWeight, bits: int, spec: QuantSpec, in_features: int, where: str) -> QuantizedLinear:
    """Invert :func:`encode`.

    Args:
        stored: what a graph holds for one layer.
        bits: stored bits.
        spec: the artifact's scheme.
        in_features: K.
        where: layer name, for the error.

    Raises:
        ArtifactError: the bytes are no weight of this scheme.
    """
    blocks = stored.codes.shape[1]
    codes = _artifact_codes(stored, bits, spec, in_features, where)
    groups = spec.groups(in_features, where)
    scales = one_per_group(stored.scales, groups, where)
    narrow = scales.astype(spec.scale_array)
    if not np.array_equal(narrow.astype(np.float32), scales):
        raise ArtifactError(f"{where}: a stored scale is no {spec.scale_dtype}")
    zero_points: NDArray[np.uint8]
    if stored.zero_points is None:
        zero_points = np.full(scales.shape, 1 << (bits - 1), np.uint8)
    else:
        zero_points = one_per_group(unpack_codes(stored.zero_points, bits, blocks), groups, where)
    if spec.symmetric and not (zero_points == spec.midpoint).all():
        raise ArtifactError(f"{where}: a stored zero point is not the midpoint of a symmetric scheme")
    try:
        return QuantizedLinear(spec, in_features, codes, narrow, None if spec.symmetric else zero_points)
    except SpecError as error:
        raise ArtifactError(f"{where}: {error}") from error


def _artifact_codes(
    stored: StoredWeight, bits: int, spec: QuantSpec, in_features: int, where: str
) -> NDArray[np.uint8]:
    """Codes packed as in the artifact; a view where the stored bytes are those."""
    rows, blocks, blob = stored.codes.shape
    packed, width = stored.codes.reshape(rows, -1), blocks * blob * 8 // bits
    if bits == spec.bits and width == in_features:
        return packed
    codes = unpack_codes(np.ascontiguousarray(packed), bits, width)
    if codes.size and int(codes.max()) > spec.max_code:
        raise ArtifactError(f"{where}: the stored code {int(codes.max())} does not fit in {spec.bits} bits")
    if codes[:, in_features:].any():
        raise ArtifactError(f"{where}: what fills the last block up is not zero")
    return pack_codes(codes[:, :in_features], spec.bits)


def one_per_group(values: NDArray[Any], groups: int, where: str) -> NDArray[Any]:
    """Values [N, G] from stored ones [N, blocks], which must repeat within a group."""
    repeated = values.reshape(values.shape[0], groups, -1)
    if not (repeated == repeated[:, :, :1]).all():
        raise ArtifactError(f"{where}: scales or zero points differ within a group")
    return np.ascontiguousarray(repeated[:, :, 0])
