"""8-bit weights and activations by ONNX Runtime's static quantization, on the written ONNX graph.

Products with constant weights get QuantizeLinear and DequantizeLinear (uint8 inputs a tensor by the range that the
samples show, int8 weights a column, symmetric), which the session fuses to MatMulIntegerToFloat.  Tables become uint8
with one scale each.  Other operators stay float: ONNX Runtime has no faster eight-bit form of attention, GELU or norms
on CPUs.  Where that loses more than is allowed, linears and tables go back to floats (targets/w8a8_control.py).

Source: onnxruntime 1.31.1, onnxruntime/quantization/quantize.py.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from roundexport.targets.w8a8_control import Allowance, cosines, reverted_until, sentence_vector
from roundexport.targets.w8a8_products import Feed, QuantizedProducts, feeds_of

from .graph import MICROSOFT
from .settings import DATA_ENDING
from .w8a8_reverted import reverted

_WEIGHTS = {"MatMul": 1, "Gather": 0}  # the input of an operator that is a weight


class _Reader:
    """Hands out samples one by one."""

    def __init__(self, feeds: list[Feed]) -> None:
        self._feeds: Iterator[Feed] = iter(feeds)

    def get_next(self) -> Any:
        """The next sample, None at the end."""
        return next(self._feeds, None)


def quantize(folder: Path, model_file: str, allowance: Allowance) -> QuantizedProducts:
    """Quantize a package's graph in place.

    Args:
        folder: of the package.
        model_file: its graph.
        allowance: calibration samples, and what may be lost.
    """
    path = folder / model_file
    written = onnx.load(path)
    layers, floats = _candidates(written.graph)
    inputs = [value.name for value in written.graph.input]
    quantized = _by_the_tool(path, written, feeds_of(allowance.for_ranges, inputs), list(layers))
    feeds = feeds_of(allowance.for_figure, inputs)
    wanted = _vectors(path, feeds)
    names = {module: node for node, module in layers.items()}

    def figure(modules: Collection[str]) -> float:
        tried = folder / f"reverted-{model_file}"
        _save(reverted(quantized, floats, _WEIGHTS, {names[module] for module in modules}), tried)
        found = cosines(_vectors(tried, feeds), wanted)
        _remove(tried)
        return float(np.mean(found))

    back, reached = reverted_until(list(names), figure, allowance.cosine)
    _remove(path)
    _save(reverted(quantized, floats, _WEIGHTS, {names[module] for module in back}), path)
    return QuantizedProducts(
        f"onnxruntime {ort.__version__}",
        tuple(module for module in names if module not in back),
        {"samples": len(allowance.for_ranges), "ranges": "minmax"},
        back,
        reached,
    )


def _candidates(graph: onnx.GraphProto) -> tuple[dict[str, str], dict[str, onnx.TensorProto]]:
    """Module and float weight of every product and table with a constant weight, by the node's name."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    weights = {node.name: node.input[_WEIGHTS[node.op_type]] for node in graph.node if node.op_type in _WEIGHTS}
    floats = {node: tensors[weight] for node, weight in weights.items() if weight in tensors}
    return {node: tensor.name.removesuffix(".weight") for node, tensor in floats.items()}, floats


def _by_the_tool(path: Path, written: onnx.ModelProto, feeds: list[Feed], nodes: list[str]) -> onnx.ModelProto:
    from onnxruntime import quantization

    source = path.with_name(f"source-{path.name}")
    imported = onnx.ModelProto()
    imported.CopyFrom(written)
    if not any(opset.domain == MICROSOFT for opset in imported.opset_import):  # sessions need none; onnx's checks do
        imported.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))
    _save(imported, source)
    aside = path.with_name(f"quantized-{path.name}")
    with _unheard():
        quantization.quantize_static(
            source,
            aside,
            _Reader(feeds),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_quantize=nodes,
            calibrate_method=quantization.CalibrationMethod.MinMax,
            extra_options={"OpTypesToExcludeOutputQuantization": list(_WEIGHTS)},
        )
    quantized = onnx.load(aside)
    for file in (source, aside):
        _remove(file)
    return quantized


@contextmanager
def _unheard() -> Iterator[None]:
    """Nothing that is logged to no logger in particular: the tool advises a step that our graphs do not need."""
    root, nowhere = logging.getLogger(), logging.NullHandler()
    root.addHandler(nowhere)
    try:
        yield
    finally:
        root.removeHandler(nowhere)


def _vectors(path: Path, feeds: list[Feed]) -> list[NDArray[np.float32]]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [sentence_vector(session.run(None, dict(feed))[0]) for feed in feeds]


def _save(model: onnx.ModelProto, path: Path) -> None:
    data = f"{path.name}{DATA_ENDING}"
    onnx.save(model, path, save_as_external_data=True, location=data, size_threshold=1024)
    if path.with_name(data).exists():  # not where every tensor is small
        shutil.copymode(path, path.with_name(data))  # onnx makes it for its owner alone


def _remove(path: Path) -> None:
    for name in (path.name, f"{path.name}{DATA_ENDING}"):
        path.with_name(name).unlink(missing_ok=True)
