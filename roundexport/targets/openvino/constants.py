"""OpenVINO constants from the artifact's bytes.

    type   bytes                                                  from packed codes (packing.py)
    u2 u4  2 or 4 bits, least significant first, one flat stream  as they are
    i4     two's complement nibbles, low one first                codes ^ 0x88      (code - 8)
    u8 i8  one per byte                                           as they are / codes ^ 0x80

A flat stream has no padding at row ends; where a row of codes does not fill whole bytes the codes are packed anew.
Three bits have no type that runs fast: they are stored in four, ``code - 4`` as i4 when symmetric (no zero point left
to read), the code itself as u4 with its zero points when not.  All of it is exact.

`openvino.Tensor(array, …)` does not keep the array alive, so every constant here owns a tensor that was allocated by
OpenVINO and then filled.  `openvino.helpers.pack_data` packs the other way round and is never used.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from roundexport.packing import pack_codes
from roundexport.quantized import QuantizedLinear
from roundexport.spec import QuantSpec

Stored = Literal["u2", "u4", "i4", "u8", "i8"]

_TYPES = {"u2": ov.Type.u2, "u4": ov.Type.u4, "i4": ov.Type.i4, "u8": ov.Type.u8, "i8": ov.Type.i8}
_WIDTH = {"u2": 2, "u4": 4, "i4": 4, "u8": 8, "i8": 8}


def stored_type(spec: QuantSpec, device: str = "cpu") -> Stored:
    """The OpenVINO type that holds this scheme's codes on a device; GPU plugins have no 2-bit type."""
    if spec.bits == 8:
        return "i8" if spec.symmetric else "u8"
    if spec.bits == 2 and device == "cpu":
        return "u2"
    return "i4" if spec.symmetric else "u4"


def needs_zero_point(spec: QuantSpec, stored: Stored) -> bool:
    """Whether the graph must subtract a zero point: unless a signed type already means 0 by the midpoint."""
    return not (spec.symmetric and stored.startswith("i"))


def code_bytes(linear: QuantizedLinear, stored: Stored) -> NDArray[np.uint8]:
    """The flat bytes of a weight constant, uint8 [ceil(N·K·width/8)]."""
    bits, width = linear.spec.bits, _WIDTH[stored]
    codes = linear.codes
    if bits != width or (linear.in_features * width) % 8:
        unpacked = linear.unpack()
        if bits != width and stored == "i4":
            unpacked += np.uint8(8 - linear.spec.midpoint)  # so that ^ 0x88 below gives code - midpoint
        codes = pack_codes(unpacked.reshape(1, -1), width)
    flip = {"i4": 0x88, "i8": 0x80}.get(stored)
    flat = codes.reshape(-1)
    return flat if flip is None else flat ^ np.uint8(flip)


def packed_constant(stored: Stored, shape: tuple[int, ...], data: NDArray[np.uint8], name: str) -> Any:
    """A constant of an integer type that owns its bytes."""
    tensor = ov.Tensor(_TYPES[stored], ov.Shape(list(shape)))
    tensor.data.reshape(-1).view(np.uint8)[:] = data
    return _named(ov.op.Constant(tensor, True), name)


def zero_point_constant(values: NDArray[np.uint8], stored: Stored, shape: tuple[int, ...], name: str) -> Any:
    """Zero points as a constant of the weight's own unsigned type, one flat stream."""
    return packed_constant(stored, shape, pack_codes(values.reshape(1, -1), _WIDTH[stored]).reshape(-1), name)


def float_constant(values: NDArray[np.floating], name: str) -> Any:
    """A float16 or float32 constant that owns its numbers."""
    tensor = ov.Tensor(ov.Type(values.dtype), ov.Shape(list(values.shape)))
    tensor.data[...] = values
    return _named(ov.op.Constant(tensor, True), name)


def exact_constant(weight: NDArray[np.float32], name: str) -> Any:
    """A float weight in the smallest type that holds every value exactly: float16, else bfloat16, else float32."""
    with np.errstate(over="ignore"):
        half = weight.astype(np.float16)
    if np.array_equal(half.astype(np.float32), weight):
        return float_constant(half, name)
    bits = np.ascontiguousarray(weight).view(np.uint32)
    if (bits & np.uint32(0xFFFF)).any():
        return float_constant(weight, name)
    tensor = ov.Tensor(ov.Type.bf16, ov.Shape(list(weight.shape)))
    tensor.data.view(np.uint16).reshape(weight.shape)[...] = (bits >> np.uint32(16)).astype(np.uint16)
    return _named(ov.op.Constant(tensor, True), name)


def _named(node: Any, name: str) -> Any:
    node.set_friendly_name(name)
    return node
