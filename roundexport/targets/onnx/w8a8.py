"""8-bit weights and activations by ONNX Runtime's static quantization, on the written ONNX graph.

Products with constant weights get QuantizeLinear and DequantizeLinear (uint8 inputs a tensor by the range that the
samples show, int8 weights a column, symmetric), which the session fuses to MatMulIntegerToFloat.  Tables become uint8
with one scale each.  Other operators stay float: ONNX Runtime has no faster eight-bit form of attention, GELU or norms
on CPUs.

Source: onnxruntime 1.31.1, onnxruntime/quantization/quantize.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from roundexport.targets.w8a8_products import Feed, QuantizedProducts, feeds_of

from .graph import MICROSOFT
from .settings import DATA_ENDING

_WEIGHTS = {"MatMul": 1, "Gather": 0}  # the input of an operator that is a weight


class _Reader:
    """Hands out samples one by one."""

    def __init__(self, feeds: list[Feed]) -> None:
        self._feeds: Iterator[Feed] = iter(feeds)

    def get_next(self) -> Any:
        """The next sample, None at the end."""
        return next(self._feeds, None)


def quantize(folder: Path, model_file: str, ids: NDArray[np.int64]) -> QuantizedProducts:
    """Quantize a package's graph in place.

    Args:
        folder: of the package.
        model_file: its graph.
        ids: calibration samples [S, T].
    """
    from onnxruntime import quantization

    path = folder / model_file
    written = onnx.load(path, load_external_data=False)
    if not any(
        opset.domain == MICROSOFT for opset in written.opset_import
    ):  # sessions need no import; onnx's checks do
        written.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))
        onnx.save(written, path)
    graph = written.graph
    feeds = feeds_of(ids, [value.name for value in graph.input])
    weights = {tensor.name for tensor in graph.initializer}
    layers = {
        node.name: node.input[_WEIGHTS[node.op_type]].removesuffix(".weight")
        for node in graph.node
        if node.op_type in _WEIGHTS and node.input[_WEIGHTS[node.op_type]] in weights
    }
    aside = folder / f"quantized-{model_file}"
    quantization.quantize_static(
        path,
        aside,
        _Reader(feeds),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        nodes_to_quantize=list(layers),
        calibrate_method=quantization.CalibrationMethod.MinMax,
        extra_options={"OpTypesToExcludeOutputQuantization": list(_WEIGHTS)},
    )
    model = onnx.load(aside)
    aside.unlink()
    for name in (model_file, f"{model_file}{DATA_ENDING}"):
        (folder / name).unlink(missing_ok=True)
    onnx.save(model, path, save_as_external_data=True, location=f"{model_file}{DATA_ENDING}", size_threshold=1024)
    return QuantizedProducts(
        f"onnxruntime {ort.__version__}", tuple(layers.values()), {"samples": len(feeds), "ranges": "minmax"}
    )
