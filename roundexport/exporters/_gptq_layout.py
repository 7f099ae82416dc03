"""Weights in the layout that GPTQ and auto-round share, as importers/_gptq_layout.py reads it.

qweight [K·b/32, N] I32    scales [G, N] F16 | BF16    qzeros [G, N·b/32] I32, one too low in v1
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from roundexport.quant.packing import pack_codes
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.word_packing import WORD_BITS, words_of_stream
from roundexport.storage.safetensors_reader import TensorSpec

from ._outgoing import Facts, stored


def refusal(facts: Facts) -> str | None:
    """Why a weight does not fit in whole words."""
    for count, what in ((facts.width, "inputs"), (facts.rows, "outputs")):
        if count * facts.spec.bits % WORD_BITS:
            return (
                f"its {count} {what} of {facts.spec.bits} bits do not fill whole 32-bit words; keep the layer "
                "float, or give it 8 bits, and tune again"
            )
    return None


def tensors(facts: Facts) -> dict[str, TensorSpec]:
    """Dtypes and shapes."""
    bits, groups = facts.spec.bits, facts.spec.groups(facts.width)
    return {
        "qweight": ("I32", (facts.width * bits // WORD_BITS, facts.rows)),
        "qzeros": ("I32", (groups, facts.rows * bits // WORD_BITS)),
        "scales": (facts.scales, (groups, facts.rows)),
    }


def pack(facts: Facts, linear: QuantizedLinear, shift: int) -> Mapping[str, NDArray[np.generic]]:
    """Values.

    Args:
        facts: of the weight.
        linear: the weight.
        shift: what is taken from stored zero points: 1 in v1, where none of them is 0, and 0 in v2.
    """
    zeros = np.ascontiguousarray(linear.full_zero_points().T - np.uint8(shift))
    return {
        "qweight": words_of_stream(linear.codes).T,
        "qzeros": words_of_stream(pack_codes(zeros, facts.spec.bits)),
        "scales": stored(linear.scales.T, facts.scales),
    }


def g_idx(facts: Facts) -> NDArray[np.int32]:
    """The group of every input: runs in order."""
    return (np.arange(facts.width) // facts.spec.group_width(facts.width)).astype(np.int32)
