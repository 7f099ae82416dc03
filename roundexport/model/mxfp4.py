"""MXFP4: 4-bit floats, 32 to a power of two; the experts of gpt-oss.

    <experts>.gate_up_proj_blocks U8 [E, N, K/32, 16]     two codes a byte, the lower four bits first
    <experts>.gate_up_proj_scales U8 [E, N, K/32]         exponent + 127
    <experts>.gate_up_proj           [E, K, N]            value(code) · 2^exponent, turned as the family stacks it

    code 0 … 7    0  0.5  1  1.5  2  3  4  6;   8 … 15 the same, negative

Every product is exact in float32.  An exponent byte of 255 means NaN and is refused.
Source: OCP Microscaling Formats 1.0; held against transformers' own `convert_moe_packed_tensors` in
tests/model/test_low_bit_floats.py.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import CheckpointError
from roundexport.importers._tensors import Tensors
from roundexport.importers.interface import QuantizedFolder

from .low_bit_floats import LowBitFloat, LowBitFloats

_BLOCK, _BIAS, _NAN = 32, 127, 255
_HALF = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_VALUES = np.concatenate([_HALF, -_HALF])
_BYTES = np.arange(256)
_PAIRS = np.stack([_VALUES[_BYTES & 15], _VALUES[_BYTES >> 4]], -1)  # of a byte


def mxfp4_weights(folder: QuantizedFolder) -> LowBitFloats:
    """The stacks of experts of a folder that are stored so.

    Args:
        folder: one whose quantization_config says ``mxfp4``.

    Raises:
        CheckpointError: tensors that contradict each other, or none.
    """
    tensors = folder.tensors
    names = [name.removesuffix("_blocks") for name in tensors.names() if name.endswith("_blocks")]
    return LowBitFloats(folder, "4-bit floats (MXFP4)", [_weight(tensors, name) for name in names])


def _weight(tensors: Tensors, name: str) -> LowBitFloat:
    blocks, scales = f"{name}_blocks", f"{name}_scales"
    shape = tensors.shape(blocks)
    if len(shape) != 4 or not all(shape):
        raise CheckpointError(f"{blocks} is {list(shape)}; experts, rows, blocks and their bytes are expected")
    tensors.check(blocks, ("U8",), (*shape[:3], _BLOCK // 2))
    tensors.check(scales, ("U8",), shape[:3])
    experts, rows, count, _ = shape
    return LowBitFloat(name, (experts, count * _BLOCK, rows), (blocks, scales), partial(_read, tensors, name))


def _read(tensors: Tensors, name: str, first: int, last: int) -> NDArray[np.float32]:
    """Experts of a stack, [E, K, N]."""
    codes, scales = (tensors.read(f"{name}_{part}")[first:last] for part in ("blocks", "scales"))
    if (scales == _NAN).any():
        raise CheckpointError(f"{name}_scales holds NaN (255), which is not a scale")
    with np.errstate(over="ignore"):
        values = np.ldexp(_PAIRS[codes].reshape(*scales.shape, _BLOCK), scales[..., None].astype(np.int32) - _BIAS)
    if not np.isfinite(values).all():
        raise CheckpointError(f"{name}_scales holds {scales.max()}, with which products are beyond float32")
    return np.ascontiguousarray(values.reshape(*scales.shape[:2], -1).swapaxes(1, 2))
