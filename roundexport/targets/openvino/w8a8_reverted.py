"""A graph that NNCF has quantized, some of whose linears read floats again.

    MatMul(FakeQuantize(x · 1/s), int8 · scale) + corrected bias  →  MatMul(x, weight) + bias
    Gather(int8 · scale, ids)                                     →  Gather(table, ids)

Weights and biases are the float graph's, so the product's input is taken from before NNCF's smoothing, too.  Operators
go by their friendly names, which NNCF keeps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

_SMOOTHED = "smooth_quant"


def reverted(
    quantized: ov.Model, floats: ov.Model, weight_input: Mapping[str, int], nodes: Collection[str]
) -> ov.Model:
    """A copy in which the operators of these friendly names are float.

    Args:
        quantized: the model.
        floats: what it was made of.
        weight_input: which input of an operator is a weight.
        nodes: friendly names.
    """
    model = quantized.clone()
    originals = {node.get_friendly_name(): node for node in floats.get_ops()}
    for node in model.get_ops():
        name = node.get_friendly_name()
        if name not in nodes or node.get_type_name() not in weight_input:
            continue
        place = weight_input[node.get_type_name()]
        for number in range(node.get_input_size()):
            if number != place:
                node.input(number).replace_source_output(_before(node.input_value(number)))
        _restore(node, originals[name], place)
        for target in node.output(0).get_target_inputs():
            after = target.get_node()
            if after.get_type_name() == "Add" and (before := originals.get(after.get_friendly_name())) is not None:
                _restore(after, before, 1 - target.get_index())
    return model


def _before(port: Any) -> Any:
    """What was smoothed and rounded to give this."""
    node = port.get_node()
    if node.get_type_name() == "FakeQuantize":
        port, node = node.input_value(0), node.input_value(0).get_node()
    if node.get_type_name() == "Multiply" and _SMOOTHED in node.get_friendly_name():
        port = node.input_value(0)
    return port


def _restore(node: Any, original: Any, place: int) -> None:
    """Let an input be the constant that it is in the float graph, where it is one."""
    values = _constant(original.input_value(place).get_node())
    if values is not None:
        node.input(place).replace_source_output(ov.opset13.constant(values).output(0))


def _constant(node: Any) -> NDArray[np.float32] | None:
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return np.array(node.data, np.float32) if node.get_type_name() == "Constant" else None
