"""The group-quantized product in C++, as a library that ONNX Runtime loads: sources, building, finding.

    y[m, n] = bias[n] + Σ_g scale[n, g] · a[m, g] · (Σ_k code[n, k] · x[m, k] − zero[n, g] · Σ_k x[m, k])

for weights of 2, 3, 4 and 8 bits in groups of a multiple of 32, three bits stored in three.  Activations are rounded to
eight bits per row and group (x, scale a), as MatMulNBits does at accuracy_level 4.

    tile.h weight.cpp        how a weight lies in memory, and how it gets there
    memory.h memory.cpp      huge pages for packed weights; pages of the package's file let go
    product.h                the loop over tiles and groups; avx512.cpp avx2.cpp generic.cpp bring the registers
    product.cpp              the C interface (roundexport_kernels.h): threads, choice of the instruction set at run time
    ort_abi.h ort_op.cpp     roundexport.kernels::GroupMatMul for ONNX Runtime
    build.py                 ``python -m roundexport.kernels.native.build``
    library.py product.py    where the built library is; the same through ctypes

Figures and what was not taken: docs/decisions/0047.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import UnsupportedError
from roundexport.kernels import group_matmul
from roundexport.quant.quantized_linear import QuantizedLinear

from .library import built
from .product import NativeWeight


def available() -> str | None:
    """None when the library is built; else what to run."""
    try:
        built()
    except UnsupportedError as error:
        return str(error)
    return None


def reference(x: NDArray[Any], linear: QuantizedLinear, bias: NDArray[Any] | None = None) -> NDArray[np.float32]:
    """The product in numpy, activations in eight bits per group.

    Args:
        x: [..., K].
        linear: weight [N, K].
        bias: [N].

    Returns:
        float32 [..., N].
    """
    return group_matmul.reference(x, linear, bias, int8_block=linear.in_features // linear.groups)


def run(x: NDArray[Any], linear: QuantizedLinear, bias: NDArray[Any] | None = None) -> NDArray[np.float32]:
    """The product as :func:`reference` has it, by the library, on this thread."""
    rows = np.asarray(x, np.float32).reshape(-1, linear.in_features)
    added = None if bias is None else np.ascontiguousarray(bias, np.float32)
    return NativeWeight.of_linear(linear).product(rows, added).reshape(*x.shape[:-1], linear.out_features)
