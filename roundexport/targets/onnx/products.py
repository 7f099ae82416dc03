"""One token's product with quantized weights and nothing else, for timing: a graph of MatMulNBits nodes side by side.

    x float32 [1, 1, K]  ->  MatMulNBits(x, B_i, scales_i[, zero_points_i])  ->  y_i float32 [1, 1, N]     i = 0, 1, …

The weights are in the form that an export would give them (kernel_forms.py, weight_layout.py).  All nodes read the same
x, and every y_i is an output bound to memory of its own, so that a run does the products and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.schemes.kernel_timing import ProductKernels

from .graph import MICROSOFT
from .kernel_forms import stored_form
from .settings import IR_VERSION, OPSET, OnnxSettings
from .weight_layout import encode


def products(weights: Sequence[QuantizedLinear], threads: int) -> Callable[[], None]:
    """What multiplies one token's activations with each of the weights, once per call.

    Args:
        weights: of one scheme and shape.
        threads: that take part.
    """
    width = weights[0].in_features
    x = ir.Value(name="x", shape=ir.Shape([1, 1, width]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, initializers = [], []
    for number, weight in enumerate(weights):
        form = stored_form(weight.spec, width)
        stored = encode(weight, form)
        values: list[ir.Value] = [x]
        for part in (stored.codes, stored.scales, stored.zero_points):
            if part is not None:
                name = f"w{number}.{len(values)}"
                values.append(ir.Value(name=name, const_value=ir.tensor(part, name=name)))
        initializers += values[1:]
        attributes = {"K": width, "N": weight.out_features, "bits": form.bits, "block_size": form.block,
                      "accuracy_level": OnnxSettings().accuracy_level}  # fmt: skip
        node = ir.node("MatMulNBits", values, attributes, domain=MICROSOFT, name=f"product{number}")
        node.outputs[0].name = f"y{number}"
        node.outputs[0].shape = ir.Shape([1, 1, weight.out_features])
        node.outputs[0].dtype = ir.DataType.FLOAT
        nodes.append(node)
    outputs = [node.outputs[0] for node in nodes]
    opsets = {"": OPSET, MICROSOFT: 1}
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=initializers, opset_imports=opsets, name="products")
    model = ir.Model(graph, ir_version=IR_VERSION)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(
        ir.serde.serialize_model(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    binding.bind_cpu_input("x", np.random.default_rng(0).standard_normal((1, 1, width), np.float32))
    for number, weight in enumerate(weights):
        room = ort.OrtValue.ortvalue_from_numpy(np.empty((1, 1, weight.out_features), np.float32))
        binding.bind_ortvalue_output(f"y{number}", room)
    return lambda: session.run_with_iobinding(binding)


PRODUCTS = ProductKernels(products, merged=True, library="onnxruntime")
