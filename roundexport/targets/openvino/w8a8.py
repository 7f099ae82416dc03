"""8-bit weights and activations by NNCF's post-training quantization, on the written OpenVINO graph.

`nncf.quantize` with the scheme for transformers: symmetric weights a row, asymmetric activations a tensor by the range
that the samples show (preset mixed), activations smoothed into weights (alpha .95), biases corrected.  Weights are
int8 in the file; the CPU plugin multiplies them as integers.  Embedding tables become int8 as well.

Source: nncf 3.4, nncf/quantization/quantize_model.py.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from roundexport.errors import UnsupportedError
from roundexport.targets.w8a8_products import QuantizedProducts, feeds_of

from .saving import save

_WEIGHTS = {"MatMul": 1, "Gather": 0}  # the input of an operator that is a weight


def quantize(folder: Path, model_file: str, ids: NDArray[np.int64]) -> QuantizedProducts:
    """Quantize a package's graph in place.

    Args:
        folder: of the package.
        model_file: its graph.
        ids: calibration samples [S, T].

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
    feeds = feeds_of(ids, [port.get_any_name() for port in model.inputs])
    quantized = nncf.quantize(
        model,
        nncf.Dataset(feeds),
        subset_size=len(feeds),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
    )
    layers = tuple(name for node in quantized.get_ops() if (name := _linear(node)) is not None)
    aside = path.with_name(f"quantized-{path.name}")  # the graph still reads the first file
    save(quantized, aside)
    del model, quantized
    for ending in (".xml", ".bin"):
        aside.with_suffix(ending).replace(path.with_suffix(ending))
    return QuantizedProducts(f"nncf {version('nncf')}", layers, {"samples": len(feeds), "preset": "mixed"})


def _linear(node: Any) -> str | None:
    """The module of a product or table whose weight is int8, or None."""
    if node.get_type_name() not in _WEIGHTS:
        return None
    weight = node.input_value(_WEIGHTS[node.get_type_name()]).get_node()
    while weight.get_type_name() in ("Multiply", "Subtract", "Convert", "Reshape"):
        weight = weight.input_value(0).get_node()
    whole = weight.get_type_name() == "Constant" and weight.get_element_type() in (ov.Type.i8, ov.Type.u8)
    return str(node.get_friendly_name().removesuffix("/product")) if whole else None
