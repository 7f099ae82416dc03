"""Bytes of a weight in the standard dialect, [K, N] as MatMul reads it; exact both ways.

    artifact               codes                              zero points
    2, 3, 4 bits  sym      INT4   code − 2^(bits−1)           none
                  asym     UINT4  code                        UINT4 [G, N]
    8 bits        sym      INT8   code − 128                  none
                  asym     UINT8  code                        UINT8 [G, N]
    any embedding          INT8 or UINT8 likewise             a runtime looks rows of 4-bit numbers up nowhere

Scales are float32 [G, N], and so are zero points.  A whole row is cut into blocks that repeat its scale, because ONNX
Runtime fuses blocks only (seen with 8 bits); where none divides K they are [N], ONNX's quantization per axis.
INT4 and UINT4 are packed as ONNX has it: the tensor as one stream, the first of two numbers in the low half of a byte.

INT2 and UINT2 came with opset 25 and few runtimes have them; so 2-bit codes take 4 bits here, as 3-bit codes do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from roundexport.errors import ArtifactError, SpecError
from roundexport.quant.packing import pack_codes, unpack_codes
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec
from roundexport.targets.onnx.kernel_forms import dividing_block
from roundexport.targets.onnx.weight_layout import one_per_group

Kind = Literal["INT4", "UINT4", "INT8", "UINT8"]
TYPES: dict[Kind, ir.DataType] = {
    "INT4": ir.DataType.INT4, "UINT4": ir.DataType.UINT4, "INT8": ir.DataType.INT8, "UINT8": ir.DataType.UINT8,
}  # fmt: skip


@dataclass(frozen=True)
class StandardForm:
    """The form of one weight.

    Args:
        kind: ONNX type of the codes.
        block: rows of [K, N] that share a scale; None: all of them, told per axis.
    """

    kind: Kind
    block: int | None

    @property
    def bits(self) -> int:
        """Stored bits of a code."""
        return 4 if self.kind.endswith("4") else 8

    def describe(self) -> str:
        """Short name, as in the package manifest."""
        return f"{self.kind}, {'per row' if self.block is None else f'block {self.block}'}"


def standard_form(spec: QuantSpec, in_features: int, looked_up: bool) -> StandardForm:
    """The form of a weight.

    Args:
        spec: the artifact's scheme.
        in_features: K.
        looked_up: whether rows of it are looked up: an embedding.
    """
    wide = looked_up or spec.bits == 8
    kinds: tuple[Kind, Kind] = ("INT8", "UINT8") if wide else ("INT4", "UINT4")
    block = spec.group_size or dividing_block(8 if wide else 4, in_features)
    return StandardForm(kinds[0 if spec.symmetric else 1], block)


@dataclass(frozen=True, eq=False)
class StandardWeight:
    """One weight as the graph holds it.

    Args:
        codes: bytes of [K, N].
        scales: float32 [G, N] or [N].
        zero_points: bytes of a tensor shaped as the scales, or None.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None


def encode(linear: QuantizedLinear, form: StandardForm) -> StandardWeight:
    """The bytes of a weight in the form that :func:`standard_form` chose for it."""
    signed = form.kind.startswith("I")
    values = linear.unpack()
    if signed:
        values -= np.uint8(linear.spec.midpoint)  # modulo 256: two's complement
    repeats = linear.in_features // (form.block or linear.in_features) // linear.groups
    scales = np.repeat(linear.scales.astype(np.float32), repeats, axis=1).T
    zero_points = None if signed else np.repeat(linear.full_zero_points(), repeats, axis=1).T
    if form.block is None:
        scales, zero_points = scales[0], None if zero_points is None else zero_points[0]
    return StandardWeight(
        _packed(values.T, form.bits),
        np.ascontiguousarray(scales),
        None if zero_points is None else _packed(zero_points, form.bits),
    )


def decode(
    stored: StandardWeight, form: StandardForm, spec: QuantSpec, shape: tuple[int, int], where: str
) -> QuantizedLinear:
    """Invert :func:`encode`.

    Args:
        stored: what a graph holds.
        form: in which form.
        spec: the artifact's scheme.
        shape: (N, K).
        where: layer name, for errors.

    Raises:
        ArtifactError: the bytes are no weight of this scheme.
    """
    rows, width = shape
    groups, blocks = spec.groups(width, where), stored.scales.size // rows
    scales = one_per_group(stored.scales.reshape(blocks, rows).T, groups, where)
    narrow = scales.astype(spec.scale_array)
    if not np.array_equal(narrow.astype(np.float32), scales):
        raise ArtifactError(f"{where}: a stored scale is no {spec.scale_dtype}")
    values = np.ascontiguousarray(_unpacked(stored.codes, form.bits, width * rows).reshape(width, rows).T)
    zero_points = None
    if form.kind.startswith("I"):
        values += np.uint8(spec.midpoint)
        if form.bits == 4:
            values &= np.uint8(15)
        zero_points = np.full((rows, groups), spec.midpoint, np.uint8)
    elif stored.zero_points is not None:
        flat = _unpacked(stored.zero_points, form.bits, blocks * rows)
        zero_points = one_per_group(flat.reshape(blocks, rows).T, groups, where)
    if zero_points is None or (spec.symmetric and not (zero_points == spec.midpoint).all()):
        raise ArtifactError(f"{where}: zero points are missing, or not the midpoint of a symmetric scheme")
    try:
        return QuantizedLinear.from_unpacked(spec, values, narrow, None if spec.symmetric else zero_points)
    except SpecError as error:
        raise ArtifactError(f"{where}: {error}") from error


def _packed(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The bytes of a tensor; of each value the low bits count."""
    flat = np.ascontiguousarray(values).reshape(1, -1)
    packed: NDArray[np.uint8] = (flat if bits == 8 else pack_codes(flat & np.uint8(15), 4)).reshape(-1)
    return packed


def _unpacked(raw: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    return np.array(raw[:count]) if bits == 8 else unpack_codes(np.ascontiguousarray(raw).reshape(1, -1), 4, count)[0]
