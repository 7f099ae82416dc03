"""A linear of eight-bit inputs, where the artifact settles how they become integers (`--recipe bct`).

    Multiply      x · 2**-(e[k] - least e)                                only where blocks of channels differ
    FakeQuantize  256 levels of 2**(least e), from -128 to 127
    MatMul        with the weight below, transposed
    Add           the bias

    Constant  i4 [N, B, K/B]          "<module>.weight"
    Convert   i8
    Multiply  i8 [B, 1]               2**(e - least e), or 2 where all are alike: "<module>.weight/steps"
    Reshape   [N, K]
    Convert   f32
    Multiply  f16 [N, 1] as f32       "<module>.weight/scale", times the least of the steps the artifact's

e are the exponents of the inputs' blocks of channels (model/integer_inputs.py).  The plugin computes the part of
constants once, when it compiles the graph, and multiplies int8 matrices (runtimePrecision i8) from then on; the file
holds four bits a weight.  Products and sums are integers, those of kernels/integer_linear.py; FakeQuantize rounds
halves to even.

Measured at the products of MiniLM (openvino 2026.4.1, AVX-512 with VNNI, one thread, 64 tokens, K 384, N 1536): float32
1.65 ms, bfloat16 .92, i4 compressed .80, this .25, int8 weights in the file .25 (a machine with other work on it; the
least of 50).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as ops

from roundexport.kernels._block_format import Format
from roundexport.model.integer_inputs import refuse_unfit
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import LinearInfo

from .constants import INTEGER_INPUTS, POWERS, code_bytes, float_constant, packed_constant
from .graph import Graph, integers

FORM = f"i4 {POWERS}{INTEGER_INPUTS}"
RULE = "8-bit inputs"


def product(graph: Graph, x: Any, info: LinearInfo, name: str) -> Any | None:
    """The linear's product without its bias, or None where this form does not hold it."""
    owner = graph.weights.owner(info.name)
    entering = None if owner is None else graph.weights.entering(owner)
    if owner is None or entering is None:
        return None
    linear = graph.weights.quantized(owner)
    refuse_unfit(owner, linear, entering)
    graph.used[owner] = FORM
    graph.fusions[RULE] += 1
    steps = entering.exponents.astype(np.int32) - int(entering.exponents.min())
    if steps.any():
        x = ops.multiply(x, graph.once(("steps", info.name), lambda: _factors(steps, entering, f"{info.name}/steps")))
    least = 2.0 ** int(entering.exponents.min())
    ends = [ops.constant(np.array(code * least, np.float32)) for code in (-128, 127)]
    entered = ops.fake_quantize(x, *ends, *ends, 256, name=f"{info.name}/entered")
    weight = graph.once(("integers", owner), lambda: _weight(linear, steps, f"{owner}.weight"))
    return ops.matmul(entered, weight, False, True, name=name)


def _factors(steps: np.ndarray[Any, Any], entering: Format, name: str) -> Any:
    """What aligns the channels, [K]; a number for each block in the file."""
    each = float_constant(np.ldexp(np.float16(1), -steps)[:, None], name)
    whole = ops.broadcast(ops.convert(each, ov.Type.f32), integers(steps.size, entering.block))
    return ops.reshape(whole, integers(entering.width), False)


def _weight(linear: QuantizedLinear, steps: np.ndarray[Any, Any], name: str) -> Any:
    rows, width, blocks = linear.out_features, linear.in_features, steps.size
    codes = packed_constant("i4", (rows, blocks, width // blocks), code_bytes(linear, "i4"), name)
    node = ops.convert(codes, ov.Type.i8)
    # A multiplication by 1 would be taken out, and with it what tells the plugin that these are no compressed weights.
    by = 1 << (steps if steps.any() else steps + 1)
    step = packed_constant("i8", (blocks, 1), by.astype(np.uint8), f"{name}/steps")
    node = ops.reshape(ops.multiply(node, step), integers(rows, width), False)
    scales = linear.scales / np.float32(by.min())
    half = np.array_equal(scales.astype(np.float16).astype(np.float32), scales)
    scale = float_constant(scales.astype(np.float16) if half else scales, f"{name}/scale")
    return ops.multiply(ops.convert(node, ov.Type.f32), ops.convert(scale, ov.Type.f32))
