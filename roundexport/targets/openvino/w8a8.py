"""8-bit weights and activations by NNCF's post-training quantization, on the written OpenVINO graph.

`nncf.quantize` with the scheme for transformers: symmetric weights a row, asymmetric activations a tensor by the range
that the samples show (preset mixed), activations smoothed into weights (alpha .95), biases corrected.  Weights are
int8 in the file; the CPU plugin multiplies them as integers.  Embedding tables become int8 as well.  It is
`nncf.quantize_with_accuracy_control`: where more is lost than allowed, NNCF ranks the products and reverts the worst.

Source: nncf 3.4, nncf/quantization/quantize_model.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from roundexport.errors import UnsupportedError
from roundexport.targets.w8a8_control import Allowance, cosines, sentence_vector
from roundexport.targets.w8a8_products import Feed, QuantizedProducts, feeds_of

from .saving import save

_WEIGHTS = {"MatMul": 1, "Gather": 0}  # the input of an operator that is a weight
_INTEGERS, _FLOATS = (ov.Type.i8, ov.Type.u8), (ov.Type.f32, ov.Type.f16, ov.Type.bf16)


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
    wanted = _vectors(_compiled(model), feeds)
    before = [name for node in model.get_ops() if (name := _linear(node, _FLOATS)) is not None]

    def figures(compiled: Any, items: Iterable[tuple[Feed, NDArray[np.float32]]]) -> tuple[float, list[float]]:
        asked = list(items)
        found = cosines(_vectors(compiled, [feed for feed, _ in asked]), [vector for _, vector in asked])
        return float(np.mean(found)), found

    quantized = nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset(ranges),
        nncf.Dataset(list(zip(feeds, wanted, strict=True)), lambda item: item[0]),
        figures,
        max_drop=1 - allowance.cosine,
        drop_type=nncf.DropType.ABSOLUTE,
        subset_size=len(ranges),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
    )
    layers = tuple(name for node in quantized.get_ops() if (name := _linear(node, _INTEGERS)) is not None)
    reached = float(np.mean(cosines(_vectors(_compiled(quantized), feeds), wanted)))
    aside = path.with_name(f"quantized-{path.name}")  # the graph still reads the first file
    save(quantized, aside)
    del model, quantized
    for ending in (".xml", ".bin"):
        aside.with_suffix(ending).replace(path.with_suffix(ending))
    back = tuple(name for name in before if name not in layers)
    asked = {"samples": len(ranges), "preset": "mixed"}
    return QuantizedProducts(f"nncf {version('nncf')}", layers, asked, back, reached)


def _compiled(model: ov.Model) -> ov.CompiledModel:
    return ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def _vectors(compiled: Any, feeds: Sequence[Feed]) -> list[NDArray[np.float32]]:
    return [sentence_vector(compiled(dict(feed))[0]) for feed in feeds]


def _linear(node: Any, types: tuple[ov.Type, ...]) -> str | None:
    """The module of a product or table whose weight is a constant of one of these types, or None."""
    if node.get_type_name() not in _WEIGHTS:
        return None
    weight = node.input_value(_WEIGHTS[node.get_type_name()]).get_node()
    while weight.get_type_name() in ("Multiply", "Subtract", "Convert", "Reshape"):
        weight = weight.input_value(0).get_node()
    whole = weight.get_type_name() == "Constant" and weight.get_element_type() in types
    return str(node.get_friendly_name().removesuffix("/product")) if whole else None
