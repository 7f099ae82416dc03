"""The library through ctypes, beside ONNX Runtime: for tests, and for timing a product alone.

weight = NativeWeight.of(codes, scales, zero_points, in_features, bits)      packed as a graph has them
y = weight.product(x)                                                        x [M, K] -> y [M, N], one thread
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import SpecError, WontFitError
from roundexport.quant.packing import pack_codes
from roundexport.quant.quantized_linear import QuantizedLinear

from .library import built, opened

INSTRUCTION_SETS = ("avx512vnni", "avx2", "generic")
_Pointer, _Int = ctypes.c_void_p, ctypes.c_int


@functools.cache
def _loaded(path: Path) -> ctypes.CDLL:
    found = opened(path)
    found.roundexport_weight.restype = _Pointer
    found.roundexport_weight.argtypes = [_Pointer, _Pointer, _Int, _Pointer, _Int, _Int, _Int, _Int]
    found.roundexport_free_weight.argtypes = [_Pointer]
    found.roundexport_weight_bytes.restype = ctypes.c_size_t
    found.roundexport_weight_bytes.argtypes = [_Pointer]
    for name in ("roundexport_product", "roundexport_exact_product"):
        getattr(found, name).argtypes = [_Pointer, _Pointer, _Int, _Pointer, _Pointer, _Pointer, _Pointer]
    found.roundexport_set_isa.argtypes = [ctypes.c_char_p]
    return found


def force(name: str) -> bool:
    """Let all further products of this process use an instruction set; False: the processor or the build lacks it."""
    return bool(_loaded(built()).roundexport_set_isa(name.encode()) == 0)


def _check(name: str, array: NDArray[Any], dtypes: tuple[type[np.generic], ...], shape: tuple[int, ...]) -> None:
    """Hold an array against what the library reads behind its pointer."""
    if array.dtype not in dtypes or array.shape != shape:
        wanted = " or ".join(dtype.__name__ for dtype in dtypes)
        raise SpecError(f"{name} must be {wanted} {list(shape)}, found {array.dtype} {list(array.shape)}")


class NativeWeight:
    """A weight [N, K] in the library's own layout."""

    def __init__(self, handle: int, rows: int, in_features: int) -> None:
        self._library = _loaded(built())
        self._handle: int | None = handle
        self._rows, self._in_features = rows, in_features

    @classmethod
    def of(
        cls,
        codes: NDArray[np.uint8],
        scales: NDArray[Any],
        zero_points: NDArray[np.uint8] | None,
        in_features: int,
        bits: int,
    ) -> NativeWeight:
        """Pack a weight.

        Args:
            codes: uint8 [N, G, group·bits/8], low bits first.
            scales: float16 or float32 [N, G].
            zero_points: uint8 [N, ceil(G·bits/8)], low bits first; None: ``2**(bits-1)``.
            in_features: K.
            bits: 2, 3, 4 or 8.

        Raises:
            SpecError: the library takes no such weight, or arrays are not as described.
            UnsupportedError: it is not built.
        """
        if codes.ndim != 3 or codes.dtype != np.uint8:
            raise SpecError(f"codes must be uint8 [N, G, group·bits/8], found {codes.dtype} {list(codes.shape)}")
        rows, groups, width = codes.shape
        group = width * 8 // bits
        if bits not in (2, 3, 4, 8) or group % 32 or not group:
            raise SpecError(f"no product for {bits} bits in groups of {group}: take 2, 3, 4 or 8 and a multiple of 32")
        if groups != -(-in_features // group):
            raise SpecError(f"{in_features} columns have {-(-in_features // group)} groups of {group}, found {groups}")
        _check("scales", scales, (np.float16, np.float32), (rows, groups))
        if zero_points is not None:
            _check("zero points", zero_points, (np.uint8,), (rows, -(-groups * bits // 8)))
        arrays = [np.ascontiguousarray(codes), np.ascontiguousarray(scales)]  # kept alive until all is copied
        points = None if zero_points is None else np.ascontiguousarray(zero_points)
        handle = _loaded(built()).roundexport_weight(
            arrays[0].ctypes.data,
            arrays[1].ctypes.data,
            scales.dtype == np.float16,
            None if points is None else points.ctypes.data,
            in_features,
            rows,
            bits,
            group,
        )
        if not handle:
            raise WontFitError(f"a weight [{rows}, {in_features}] of {bits} bits cannot be packed: memory is short")
        return cls(handle, rows, in_features)

    @classmethod
    def of_linear(cls, linear: QuantizedLinear) -> NativeWeight:
        """Pack a weight as an artifact has it.

        Raises:
            SpecError: see `of`.
            UnsupportedError: likewise.
        """
        bits = linear.spec.bits
        points = None if linear.spec.symmetric else pack_codes(linear.full_zero_points(), bits)
        scales = linear.scales if linear.scales.dtype == np.float16 else linear.scales.astype(np.float32)
        codes = linear.codes.reshape(linear.out_features, linear.groups, -1)
        return cls.of(codes, scales, points, linear.in_features, bits)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return int(self._library.roundexport_weight_bytes(self._handle))

    def product(
        self, x: NDArray[np.float32], bias: NDArray[np.float32] | None = None, exact: bool = False
    ) -> NDArray[np.float32]:
        """``x [M, K] · Wᵀ + bias`` on this thread; ``exact``: x stays float32, slowly."""
        if x.ndim != 2 or x.shape[1] != self._in_features:
            raise SpecError(f"x must be [M, {self._in_features}], found {list(x.shape)}")
        if bias is not None:
            _check("bias", bias, (np.float32,), (self._rows,))
            bias = np.ascontiguousarray(bias)
        x, y = np.ascontiguousarray(x, np.float32), np.empty((len(x), self._rows), np.float32)
        run = self._library.roundexport_exact_product if exact else self._library.roundexport_product
        run(self._handle, x.ctypes.data, len(x), None if bias is None else bias.ctypes.data, y.ctypes.data, None, None)
        return y

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.roundexport_free_weight(self._handle)
            self._handle = None
