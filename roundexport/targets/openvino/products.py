"""One token's product with quantized weights and nothing else, for timing: a graph of compressed MatMuls side by side.

    x float32 [1, 1, K]  ->  MatMul(x, chain_i)  ->  y_i float32 [1, 1, N]     i = 0, 1, …     chains as in weight.py

Compiled as the engine compiles a package; the shape of x is dynamic, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import openvino as ov
from openvino import opset15 as ops

from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.schemes.kernel_timing import ProductKernels

from .constants import stored_type
from .weight import compressed_chain


def products(weights: Sequence[QuantizedLinear], threads: int) -> Callable[[], None]:
    """What multiplies one token's activations with each of the weights, once per call.

    Args:
        weights: of one scheme and shape.
        threads: that take part.
    """
    width = weights[0].in_features
    stored = stored_type(weights[0].spec, width)
    x = ops.parameter([-1, -1, width], np.float32, name="x")
    chains = (compressed_chain(weight, stored, f"w{number}") for number, weight in enumerate(weights))
    model = ov.Model([ops.matmul(x, chain, False, True) for chain in chains], [x], "products")
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    if stored == "u2":
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0  # as a package with such constants asks for
    request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
    values = np.random.default_rng(0).standard_normal((1, 1, width), np.float32)
    request.set_input_tensor(ov.Tensor(values))

    def run() -> None:
        request.start_async()  # `infer` would copy every output to numpy
        request.wait()

    return run


PRODUCTS = ProductKernels(products, merged=True, library="openvino")
