"""8-bit weights and activations by NNCF's post-training quantization, on the written OpenVINO graph.

`nncf.quantize` with the scheme for transformers: symmetric weights a row, asymmetric activations a tensor by the range
that the samples show (preset mixed), activations smoothed into weights (alpha .95), biases corrected.  Weights are
int8 in the file; the CPU plugin multiplies them as integers.  Embedding tables become int8 as well.

Where that loses more than is allowed, linears and tables go back to floats (targets/w8a8_control.py), and not by
`nncf.quantize_with_accuracy_control`: NNCF 3.4 puts unsmoothed weights behind inputs that stay smoothed, and took a toy
whose plain form had a cosine of .997 to .980 with every product reverted.

Source: nncf 3.4, nncf/quantization/quantize_model.py.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from roundexport.errors import UnsupportedError
from roundexport.targets.w8a8_control import Allowance, cosines, reverted_until, sentence_vector
from roundexport.targets.w8a8_products import Feed, QuantizedProducts, feeds_of

from .saving import save
from .w8a8_reverted import reverted

_WEIGHTS = {"MatMul": 1, "Gather": 0}  # the input of an operator that is a weight


def quantize(folder: Path, model_file: str, allowance: Allowance) -> QuantizedProducts:
    """Quantize a package's graph in place.

    Args:
        folder: of the package.
        model_file: its graph.
        allowance: calibration samples, and what may be lost.

    Raises:
        UnsupportedError: NNCF is not installed.
    """
    os.environ.setdefault("NNCF_TELEMETRY", "0")
    try:
        import nncf
    except ImportError as error:
        raise UnsupportedError("recipe w8a8 for openvino needs NNCF: pip install 'roundexport[w8a8]'") from error
    path = folder / model_file
    model = ov.Core().read_model(path)
    inputs = [port.get_any_name() for port in model.inputs]
    ranges, feeds = (feeds_of(ids, inputs) for ids in (allowance.for_ranges, allowance.for_figure))
    wanted = _vectors(model, feeds)
    quantized = nncf.quantize(
        model,
        nncf.Dataset(ranges),
        subset_size=len(ranges),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
    )
    names = {name: node.get_friendly_name() for node in quantized.get_ops() if (name := _linear(node)) is not None}

    def without(modules: Collection[str]) -> ov.Model:
        return reverted(quantized, model, _WEIGHTS, {names[module] for module in modules})

    def figure(modules: Collection[str]) -> float:
        return float(np.mean(cosines(_vectors(without(modules), feeds), wanted)))

    back, reached = reverted_until(list(names), figure, allowance.cosine)
    aside = path.with_name(f"quantized-{path.name}")  # the graph still reads the first file
    save(without(back), aside)
    for ending in (".xml", ".bin"):
        aside.with_suffix(ending).replace(path.with_suffix(ending))
    layers = tuple(name for name in names if name not in back)
    asked: dict[str, str | int | float] = {"samples": len(ranges), "preset": "mixed"}
    return QuantizedProducts(f"nncf {version('nncf')}", layers, asked, back, reached)


def _vectors(model: ov.Model, feeds: Sequence[Feed]) -> list[NDArray[np.float32]]:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [sentence_vector(compiled(dict(feed))[0]) for feed in feeds]


def _linear(node: Any) -> str | None:
    """The module of a product or table whose weight is int8, or None."""
    if node.get_type_name() not in _WEIGHTS:
        return None
    weight = node.input_value(_WEIGHTS[node.get_type_name()]).get_node()
    while weight.get_type_name() in ("Multiply", "Subtract", "Convert", "Reshape"):
        weight = weight.input_value(0).get_node()
    whole = weight.get_type_name() == "Constant" and weight.get_element_type() in (ov.Type.i8, ov.Type.u8)
    return str(node.get_friendly_name().removesuffix("/product")) if whole else None
