"""FP8 with a scale per block: DeepSeek-V3's weights, Qwen3's FP8 files, MiniMax, MXFP8.

    <layer>.weight            F8_E4M3 or F8_E5M2 [N, K], or [E, N, K] of stacked experts
    <layer>.weight_scale_inv  [⌈N/128⌉, ⌈K/128⌉] (`weight_block_size`), or one number for the whole weight

    weight[n, k] = value(code[n, k]) · scale_inv[n // 128, k // 128]

Blocks at the edges may be cut off.  Scales are floats, or exponents + 127 in a byte (E8M0).  The name notwithstanding
the scale is multiplied.  Codes of NaN stay NaN, as in a float file.
Source: `weight_dequant` of DeepSeek-V3; held against transformers' own `Fp8Dequantize` in
tests/model/test_low_bit_floats.py, which takes no blocks that are cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import CheckpointError, UnsupportedError
from roundexport.importers._tensors import Tensors
from roundexport.importers.interface import QuantizedFolder

from .low_bit_floats import LowBitFloat, LowBitFloats

_CODES = ("F8_E4M3", "F8_E5M2")
_EXPONENTS = ("U8", "F8_E8M0")
_ACTIVATIONS = (".activation_scale", ".input_scale")
_BAND = 128  # rows that are looked up at a time


def fp8_weights(folder: QuantizedFolder) -> LowBitFloats:
    """The weights of a folder that are stored so.

    Args:
        folder: one whose quantization_config says ``fp8``.

    Raises:
        UnsupportedError: experts of 4-bit floats, or blocks that are not a matrix's.
        CheckpointError: tensors that contradict each other or the config, or none.
    """
    tensors, config = folder.tensors, folder.config
    if config.get("expert_dtype", "fp8") != "fp8":
        raise UnsupportedError(
            f"{folder.location}: its experts are {config['expert_dtype']} beside FP8 (expert_dtype), which is not read"
        )
    block = config.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise UnsupportedError(f"{folder.location}: weight_block_size {block!r:.60} is not that of blocks of a matrix")
    weights = [_weight(tensors, name, block) for name in tensors.names() if tensors.dtype(name) in _CODES]
    ignored = tuple(name for name in tensors.names() if name.endswith(_ACTIVATIONS))
    note = ("activations, which its owner's kernels round to 8 bits as well, stay floats",)
    return LowBitFloats(folder, "8-bit floats (FP8)", weights, ignored, note)


def _weight(tensors: Tensors, name: str, block: Sequence[int] | None) -> LowBitFloat:
    shape, scale = tensors.shape(name), f"{name}_scale_inv"
    if scale not in tensors:
        raise CheckpointError(f"{name} is {tensors.dtype(name)}, but there is no {scale} beside it")
    if len(shape) not in (2, 3) or not all(shape):
        raise UnsupportedError(f"{name} is {list(shape)}; matrices, and stacks of them, are read")
    found = tensors.shape(scale)
    rows, columns = _block(name, shape, found, block)
    return LowBitFloat(name, shape, (name, scale), partial(_read, tensors, name, rows, columns))


def _block(name: str, shape: tuple[int, ...], scale: tuple[int, ...], block: Sequence[int] | None) -> tuple[int, int]:
    """Rows and columns to a scale."""
    *stack, rows, columns = shape
    if scale in ((), (1,)):
        return rows, columns
    wanted = "one per weight"
    if block is not None:
        size = block[0], block[1]
        expected = (*stack, -(-rows // size[0]), -(-columns // size[1]))
        if scale == expected:
            return size
        wanted = f"{list(expected)} or one per weight"
    raise CheckpointError(f"{name}_scale_inv is {list(scale)}; of {name} {list(shape)} {wanted} is expected")


def _read(tensors: Tensors, name: str, height: int, width: int, first: int, last: int) -> NDArray[np.float32]:
    """Rows of a matrix, or matrices of a stack."""
    table, codes = _values(tensors.dtype(name)), tensors.read(name)
    scales = _scales(tensors, f"{name}_scale_inv")
    if codes.ndim == 2:
        return _widened(codes[first:last], table, scales, (height, width), first)
    whole = np.broadcast_to(scales, (len(codes), *scales.shape[-2:]))
    made = [_widened(codes[expert], table, whole[expert], (height, width), 0) for expert in range(first, last)]
    return np.stack(made) if made else np.empty((0, *codes.shape[1:]), np.float32)


def _widened(
    codes: NDArray[np.uint8],
    table: NDArray[np.float32],
    scales: NDArray[np.float32],
    block: tuple[int, int],
    first: int,
) -> NDArray[np.float32]:
    """Rows [n, K] of a matrix from its row ``first`` on, some at a time."""
    rows = (first + np.arange(len(codes))) // block[0]
    made = np.empty(codes.shape, np.float32)
    for start in range(0, len(codes), _BAND):
        band = slice(start, start + _BAND)
        made[band] = table[codes[band]]
        made[band] *= np.repeat(scales[rows[band]], block[1], 1)[:, : codes.shape[1]]
    return made


def _scales(tensors: Tensors, name: str) -> NDArray[np.float32]:
    """Scales as float32, two axes at least."""
    if tensors.dtype(name) in _EXPONENTS:
        exponents = tensors.read(name)
        if (exponents == 255).any():
            raise CheckpointError(f"{name} holds NaN (255), which is not a scale")
        values = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)
    else:
        values = tensors.scales(name, tensors.shape(name)).astype(np.float32)
    grid: NDArray[np.float32] = values if values.ndim >= 2 else values.reshape(1, 1)
    return grid


def _values(dtype: str) -> NDArray[np.float32]:
    """What each of the 256 codes stands for."""
    bits = 3 if dtype == "F8_E4M3" else 2
    bias = 7 if bits == 3 else 15
    code = np.arange(256)
    fraction, exponent = code & ((1 << bits) - 1), (code & 127) >> bits
    normal = exponent > 0
    size = np.ldexp((fraction + normal * (1 << bits)).astype(np.float32), np.maximum(exponent, 1) - bias - bits)
    if bits == 3:
        size[(code & 127) == 127] = np.nan
    else:
        size[(code & 127) == 124], size[(code & 127) > 124] = np.inf, np.nan
    signed: NDArray[np.float32] = np.where(code > 127, -size, size).astype(np.float32)
    return signed
