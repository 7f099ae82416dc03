"""Products whose activations stay floats while the plugin rounds all others' to eight bits.

The CPU plugin's dynamic quantization is one property for a graph, and no node can be told apart by runtime info.  But
it takes a product only if its weight's zero point is of an integer type, or there is none
(``useDynamicQuantizationImpl`` in src/plugins/intel_cpu/src/nodes/executors/dnnl/dnnl_fullyconnected_primitive.cpp).
So a layer whose zero point is stored as a float, of the same value, keeps its activations as they come: float32, or
bfloat16 where the graph computes in that.  Weights stay compressed, and read-back holds the zero point to be whole.
Measured with 2026.4.1 (tests/targets/test_openvino_float_products.py): the error of such a product is float32's.

For one token it takes 1.7 to 2.3 times as long in four bits and 1.3 to 1.4 in eight (CPU time, one thread, N·K from
576·960 to 49152·576; AMD EPYC with AVX-512, VNNI and BF16).  Two bits are never rounded so (export.py).
"""

from __future__ import annotations

from roundexport.quant.spec import LinearInfo, QuantSpec

from .constants import Stored, stored_type

_SLOWDOWN: dict[Stored, float] = {"i4": 2.0, "u4": 2.0, "i8": 1.4, "u8": 1.4}
_UNSIGNED: dict[Stored, Stored] = {"i4": "u4", "i8": "u8"}


def slowdown(info: LinearInfo, spec: QuantSpec) -> float | None:
    """Times as long as with activations in eight bits; None where these are floats in any case."""
    return _SLOWDOWN.get(stored_type(spec, info.in_features, info.kind))


def unsigned(stored: Stored) -> Stored:
    """The type that a weight is stored in where its zero point is a float: signed ones need none."""
    return _UNSIGNED.get(stored, stored)
