"""The product with a group-quantized weight, to which both runtimes are held.

    y[m, n] = Σ_k x[m, k] · (code[n, k] - zero_point[n, k // group]) · scale[n, k // group] + bias[n]

With ``int8_block`` = B the activations are first rounded as ONNX Runtime's MatMulNBits does at ``accuracy_level=4``:
per row and per B neighbors of K, to 8 signed bits with a scale of their own,

    a = max|x| / 127,   x̂ = round(x / a) · a        half to even; a block of zeros stays zero

where B is the weight's group size (256 at most: a whole-row group is cut into such blocks when it is exported).

`reference` adds in float64, so its own error (about 1e-16 of Σ|x·w|) is negligible in every tolerance; `run` adds in
float32 through BLAS.  Source of the rounding: onnxruntime's MLAS, SQ8BitGemm ``QuantizeARow``; its kernels differ among
themselves in the last bit of ``1 / a``, so a runtime may round single values to the neighboring integer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import SpecError
from roundexport.quant.quantized_linear import QuantizedLinear

Floats = NDArray[np.floating]


def available() -> str | None:
    """None: numpy is all it takes."""
    return None


def reference(
    x: Floats, linear: QuantizedLinear, bias: Floats | None = None, *, int8_block: int | None = None
) -> NDArray[np.float32]:
    """The product, added in float64.

    Args:
        x: [..., K].
        linear: weight [N, K].
        bias: [N].
        int8_block: round activations to 8 bits per this many neighbors of K; None leaves them as they are.

    Returns:
        float32 [..., N].

    Raises:
        SpecError: K of ``x`` and of the weight differ, or ``int8_block`` does not divide K.
    """
    rounded = _prepare(x, linear, int8_block)
    product = rounded.astype(np.float64) @ linear.dequantize().astype(np.float64).T
    return np.asarray(product if bias is None else product + bias, np.float32)


def run(
    x: Floats, linear: QuantizedLinear, bias: Floats | None = None, *, int8_block: int | None = None
) -> NDArray[np.float32]:
    """The product as :func:`reference` has it, added in float32."""
    product: NDArray[np.float32] = _prepare(x, linear, int8_block) @ linear.dequantize().T
    return product if bias is None else np.asarray(product + bias, np.float32)


def round_activations(x: Floats, block: int) -> NDArray[np.float32]:
    """Activations after rounding to 8 signed bits per ``block`` neighbors of the last axis.

    Args:
        x: [..., K].
        block: neighbors that share a scale.

    Raises:
        SpecError: ``block`` does not divide K.
    """
    width = x.shape[-1]
    if block < 1 or width % block:
        raise SpecError(f"activation blocks of {block} do not divide K={width}")
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], width // block, block)
    step = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    safe = np.where(step == 0, np.float32(1), step)
    return np.asarray(np.rint(blocks / safe) * step, np.float32).reshape(x.shape)


def _prepare(x: Floats, linear: QuantizedLinear, int8_block: int | None) -> NDArray[np.float32]:
    if x.shape[-1] != linear.in_features:
        raise SpecError(f"x has K={x.shape[-1]}, the weight K={linear.in_features}")
    return x.astype(np.float32) if int8_block is None else round_activations(x, int8_block)
