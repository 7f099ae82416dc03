"""How much longer a product with float32 activations takes on ONNX Runtime: accuracy_level 0 beside 4.

A MatMulNBits of four bits takes 3.0 to 4.1 times as long for one token (AVX-512 with VNNI, onnxruntime 1.31.1, one
thread, N·K from 576·576 to 4096·1024); of 2 and 8 bits 40 to 250 times, so these have none, and an lm_head in 8 bits
has not.
"""

from __future__ import annotations

from roundexport.quant.spec import LinearInfo, QuantSpec

from .kernel_forms import stored_form

SLOWDOWN = 3.5


def slowdown(info: LinearInfo, spec: QuantSpec) -> float | None:
    """Times as long as with activations in eight bits; None where that is no way to go."""
    return SLOWDOWN if stored_form(spec, info.in_features).bits == 4 else None
