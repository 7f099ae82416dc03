"""Which products of an OpenVINO graph the CPU plugin rounds activations for, and a graph in which it leaves some alone.

Dynamic quantization is one property for a graph.  The plugin leaves it out where a weight's zero point is a float
(targets/openvino/float_products.py says where that stands), so a product is kept exact by giving its weight one, in
memory: a signed type becomes the unsigned one of the same width, its zero point the middle.  Weights stay what they
were to the last bit, and compressed.

    Constant u4|i4|u8|i8 ─ Convert ─ [Subtract zero point] ─ Multiply scale ─ [Reshape] ─ [Convert] ─ MatMul

Source: decisions/0079; tests/targets/test_openvino_float_products.py compares the numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from roundexport.environment.openvino_import import import_openvino
from roundexport.runtime.types import Product

if TYPE_CHECKING:
    import openvino as ov

_BITS = {"u4": 4, "i4": 4, "u8": 8, "i8": 8}
_SIGN = {"i4": 0x88, "i8": 0x80}  # flipping these bits adds half of the range
_GROUP = ("runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
_BETWEEN = ("Convert", "Reshape", "Multiply", "Subtract")
_SUFFIX, _JOINED = ".weight", "+"  # of a weight's name, and between the names of layers whose rows it holds
_BIASED = "/product"  # of a product's name, where a bias is added behind it


@dataclass(frozen=True)
class _Weighted:
    """A product with its weight: the constant, and what it subtracts."""

    product: Any
    constant: Any
    subtract: Any | None

    @property
    def rounded(self) -> bool:
        """Whether the plugin rounds its activations, where it rounds any."""
        if self.subtract is None:
            return True
        zero = self.subtract.input_value(1).get_node()
        return bool(zero.get_type_name() == "Convert" and zero.input_value(0).get_node().get_type_name() == "Constant")


def products(model: ov.Model) -> tuple[Product, ...]:
    """Products with compressed weights, in the order of the graph."""
    off = model.has_rt_info(list(_GROUP)) and model.get_rt_info(list(_GROUP)).astype(str) == "0"
    return tuple(
        Product(found.product.get_friendly_name(), _layers(found), found.rounded and not off)
        for found in _weighted(model)
    )


def keep_float(model: ov.Model, rounded: Collection[str]) -> None:
    """Leave activations of all products floats but those of these names."""
    for found in list(_weighted(model)):
        if found.rounded and found.product.get_friendly_name() not in rounded:
            _with_float_zero_point(found)
    model.validate_nodes_and_infer_types()


def _weighted(model: ov.Model) -> Iterator[_Weighted]:
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        behind, subtract = node.input_value(1).get_node(), None
        while behind.get_type_name() in _BETWEEN:
            subtract = behind if behind.get_type_name() == "Subtract" else subtract
            behind = behind.input_value(0).get_node()
        named = behind.get_type_name() == "Constant" and behind.get_friendly_name().endswith(_SUFFIX)
        if named and behind.get_element_type().get_type_name() in _BITS:
            yield _Weighted(node, behind, subtract)


def _layers(found: _Weighted) -> tuple[str, ...]:
    """Layers of a product: those whose rows the weight holds; of a weight that is shared the one that reads it here."""
    several = tuple(found.constant.get_friendly_name().removesuffix(_SUFFIX).split(_JOINED))
    return several if len(several) > 1 else (found.product.get_friendly_name().removesuffix(_BIASED),)


def _with_float_zero_point(found: _Weighted) -> None:
    """Products that share the weight have it from then on."""
    ov = import_openvino()
    kind = found.constant.get_element_type().get_type_name()
    if found.subtract is not None:
        held = found.subtract.input_value(1).get_node()
        values = _unpacked(held.input_value(0).get_node())
        zero = ov.op.Constant(values.astype(_narrow(held)))
        found.subtract.input(1).replace_source_output(zero.output(0))
        return
    (port,) = found.constant.output(0).get_target_inputs()
    convert = port.get_node()
    readers = convert.output(0).get_target_inputs()
    middle = np.full([1] * len(found.constant.get_output_shape(0)), 0 if kind not in _SIGN else 1 << (_BITS[kind] - 1))
    if kind in _SIGN:
        tensor = ov.Tensor(ov.Type.u4 if _BITS[kind] == 4 else ov.Type.u8, found.constant.get_output_shape(0))
        place = np.asarray(tensor.data).reshape(-1).view(np.uint8)
        place[:] = _raw(found.constant) ^ np.uint8(_SIGN[kind])
        unsigned = ov.op.Constant(tensor, True)
        unsigned.set_friendly_name(found.constant.get_friendly_name())
        port.replace_source_output(unsigned.output(0))
    zero = ov.op.Constant(middle.astype(_narrow(convert)))
    subtract = ov.opset15.subtract(convert, zero)
    for reader in readers:
        reader.replace_source_output(subtract.output(0))


def _narrow(convert: Any) -> np.dtype[Any]:
    """The type that a weight is computed in."""
    narrow: np.dtype[Any] = np.dtype(convert.get_output_element_type(0).to_dtype())
    return narrow


def _raw(constant: Any) -> Any:
    return np.asarray(constant.data).reshape(-1).view(np.uint8)


def _unpacked(constant: Any) -> Any:
    """Unsigned integers of a constant, in its shape; of four bits the lower half of a byte comes first."""
    shape, raw = list(constant.get_output_shape(0)), _raw(constant)
    if constant.get_element_type().get_type_name() == "u4":
        raw = np.stack([raw & 15, raw >> 4], 1).reshape(-1)
    return raw[: int(np.prod(shape))].reshape(shape)
