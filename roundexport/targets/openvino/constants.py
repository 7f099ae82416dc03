"""OpenVINO constants from the artifact's bytes.

    type   bytes                                         from packed codes (packing.py)
    u2 u4  2 or 4 bits, least significant first          as they are
    i4     two's complement nibbles, low one first       codes ^ 0x88      (code - 8)
    u8 i8  one per byte                                  as they are / codes ^ 0x80

Wherever a scheme has no type of its own, or that type does not run right or compressed, its codes are stored in a
wider one.  All of it is exact; only bytes are spent:

    3 bits                              i4 as ``code - 4`` when symmetric (no zero point left to read), else u4
    2 bits, embeddings                  i4 or u4: the CPU plugin turns a u2 table to floats, a tied lm_head with it
    2 bits for GPU plugins              i4 or u4: they have no u2
    rows that do not fill whole bytes   i8 or u8: the CPU plugin's FullyConnected reads such rows from wrong places

`openvino.Tensor(array, …)` does not keep the array alive, so every constant here owns a tensor that was allocated by
OpenVINO and then filled, or lies in the export's file (constant_file.py).  `openvino.helpers.pack_data` packs the other
way round and is never used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from roundexport.quant.packing import pack_codes
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import LayerKind, QuantSpec

from .constant_file import new_tensor

Stored = Literal["u2", "u4", "i4", "u8", "i8"]

POWERS = "exponent8"  # in the name of a stored form: the scales are powers of two
INTEGER_INPUTS = ", 8-bit inputs"  # at the end of a form's name: products of integers, integer_linear.py
JOINED = "+"  # between the names of layers whose weights are one constant: siblings.py
_LEAST_HALF = 2.0**-24  # the least power of two in float16

_TYPES = {"u2": ov.Type.u2, "u4": ov.Type.u4, "i4": ov.Type.i4, "u8": ov.Type.u8, "i8": ov.Type.i8}
_WIDTH = {"u2": 2, "u4": 4, "i4": 4, "u8": 8, "i8": 8}
_SIGN_BITS = {"i4": 0x88, "i8": 0x80}  # flipping them turns code into code - 2^(width-1) in two's complement


def stored_type(spec: QuantSpec, in_features: int, kind: LayerKind = "linear", device: str = "cpu") -> Stored:
    """The OpenVINO type that holds this scheme's codes.

    Args:
        spec: the scheme.
        in_features: K.
        kind: linear or embedding.
        device: ``cpu`` or ``gpu``.
    """
    if spec.bits == 2 and kind == "linear" and device == "cpu" and in_features % 4 == 0:
        return "u2"
    if spec.bits < 8 and in_features % 2 == 0:
        return "i4" if spec.symmetric else "u4"
    return "i8" if spec.symmetric else "u8"


def needs_zero_point(spec: QuantSpec, stored: Stored) -> bool:
    """Whether the graph must subtract a zero point: unless a signed type already means 0 by the midpoint."""
    return not (spec.symmetric and stored in _SIGN_BITS)


def stored_name(stored: Stored, spec: QuantSpec) -> str:
    """What the package manifest calls a weight's form: the type, and where scales are powers of two that they are."""
    return f"{stored} {POWERS}" if spec.scale_dtype == "exponent8" else stored


def target_scales(linear: QuantizedLinear) -> NDArray[np.floating]:
    """Scales [N, G] as the graph holds them: the artifact's, and powers of two as float16 where that is exact.

    The plugin computes weights in the type of the scales, so float16 must also hold the largest code times its scale.
    """
    if linear.spec.scale_dtype != "exponent8":
        return linear.scales
    magnitude = np.abs(linear.scales)
    half = magnitude.min() >= _LEAST_HALF and magnitude.max() * linear.spec.max_code <= np.finfo(np.float16).max
    return linear.scales.astype(np.float16) if half else linear.scales


def code_bytes(linear: QuantizedLinear, stored: Stored) -> NDArray[np.uint8]:
    """The flat bytes of a weight constant, uint8 [N·K·width/8]; a row fills whole bytes (see :func:`stored_type`)."""
    width, codes = _WIDTH[stored], linear.codes
    if linear.spec.bits != width:
        shift = (1 << (width - 1)) - linear.spec.midpoint if stored in _SIGN_BITS else 0
        codes = pack_codes(linear.unpack() + np.uint8(shift), width)
    flat = codes.reshape(-1)
    return flat ^ np.uint8(_SIGN_BITS[stored]) if stored in _SIGN_BITS else flat


def packed_constant(stored: Stored, shape: tuple[int, ...], data: NDArray[np.uint8], name: str) -> Any:
    """A constant of an integer type."""
    tensor, place = new_tensor(_TYPES[stored], shape)
    place[:] = data
    return _named(ov.op.Constant(tensor, True), name)


def zero_point_constant(values: NDArray[np.uint8], stored: Stored, shape: tuple[int, ...], name: str) -> Any:
    """Zero points as a constant of the weight's own unsigned type, one flat stream."""
    return packed_constant(stored, shape, pack_codes(values.reshape(1, -1), _WIDTH[stored]).reshape(-1), name)


def float_zero_points(values: NDArray[np.uint8], dtype: np.dtype[Any], per_group: tuple[int, ...], name: str) -> Any:
    """Zero points as floats, one number where all are the same."""
    same = bool((values == values.flat[0]).all())
    held = values.reshape(-1)[:1].reshape([1] * len(per_group)) if same else values.reshape(per_group)
    return float_constant(held.astype(dtype), name)


def float_constant(values: NDArray[np.floating], name: str) -> Any:
    """A float16 or float32 constant."""
    tensor, place = new_tensor(ov.Type(values.dtype), values.shape)
    place.view(values.dtype).reshape(values.shape)[...] = values
    return _named(ov.op.Constant(tensor, True), name)


def exact_constant(weight: NDArray[np.float32], name: str) -> Any:
    """A float weight [N, K] in the smallest type that holds it exactly: float16, else bfloat16, else float32."""
    kind = _exact_type(weight)
    if kind == ov.Type.f32:
        return float_constant(weight, name)
    tensor, place = new_tensor(kind, weight.shape)
    target = place.view(np.float16 if kind == ov.Type.f16 else np.uint16).reshape(weight.shape)
    for rows in _slices(weight):
        part = weight[rows]
        target[rows] = part if kind == ov.Type.f16 else _words(part) >> np.uint32(16)
    return _named(ov.op.Constant(tensor, True), name)


def _exact_type(weight: NDArray[np.float32]) -> Any:
    half = brain = True
    for rows in _slices(weight):
        part = weight[rows]
        with np.errstate(over="ignore"):
            half = half and np.array_equal(part.astype(np.float16).astype(np.float32), part)
        brain = brain and not (_words(part) & np.uint32(0xFFFF)).any()
        if not half and not brain:
            return ov.Type.f32
    return ov.Type.f16 if half else ov.Type.bf16


def _slices(weight: NDArray[np.float32]) -> Iterator[slice]:
    """Rows a few million numbers at a time: a float embedding is the largest tensor of many a model."""
    step = max(1, (1 << 22) // weight.shape[1])
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))


def _words(part: NDArray[np.float32]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(part).view(np.uint32)


def _named(node: Any, name: str) -> Any:
    node.set_friendly_name(name)
    return node
