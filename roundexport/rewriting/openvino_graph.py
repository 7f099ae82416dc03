"""A float OpenVINO graph that somebody else made: its constants, who reads them, and compressed ones in their place.

    Constant ─[Convert|Transpose]…─ MatMul (second input)             a linear
                                  ─ Gather (axis 0, first input)      an embedding

The weight becomes the chain that plugins keep compressed (targets/openvino/weight.py), [N, K] whatever way the constant
stood, and the reader is made anew with the same name.  A packed constant comes apart: a MatMul for each layer, and a
Concat of what they give.  A layer that several nodes read has one chain.

Graphs are read and saved by OpenVINO; constants keep their types.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset15 as ops

from roundexport.errors import ArtifactError
from roundexport.formats.package import PackageLayer
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.targets.openvino.constants import stored_name, stored_type
from roundexport.targets.openvino.readback import found_layers
from roundexport.targets.openvino.saving import save
from roundexport.targets.openvino.weight import compressed_chain

from .layers import Layer, TunedLayers
from .matching import FloatConstant, Reader, Replacement, as_stored

_FLOATS = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}
_DEVICE = "cpu"


@dataclass(frozen=True, eq=False)
class _Edge:
    """The input at which a constant enters the path to a reader, and the type in which the reader gets it."""

    port: Any
    dtype: Any


class OpenVinoGraph:
    """A graph in memory, its constants mapped.

    Args:
        path: the .xml file.

    Raises:
        ArtifactError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._model = ov.Core().read_model(path)
        except RuntimeError as error:
            raise ArtifactError(f"{path}: OpenVINO cannot read it: {' '.join(str(error).split()):.200}") from error
        self._stored: dict[str, PackageLayer] = {}

    def constants(self) -> list[FloatConstant]:
        """Float matrices of the graph with their readers."""
        return [
            FloatConstant(name, _numbers(node), tuple(_readers(node, False, None)), node)
            for name, node in self._floats()
            if len(node.get_output_shape(0)) == 2 and min(node.get_output_shape(0)) > 0
        ]

    def floats(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Name and values of every float constant, whatever its rank."""
        return ((name, _numbers(node)) for name, node in self._floats())

    def set_floats(self, name: str, values: NDArray[np.float32]) -> None:
        """Give a constant other values, rounded to its type."""
        node = next(node for own, node in self._floats() if own == name)
        _replace(node, _constant(values, node.get_element_type(), name))

    def quantize(self, replacements: Sequence[Replacement], tuned: TunedLayers, out: Path) -> None:
        """Put compressed constants in the place of floats and write the graph.

        Args:
            replacements: which readers get which layers.
            tuned: the integers.
            out: folder to write to, under the graph's own name.
        """
        tables = {piece.layers[0].name for piece in replacements if piece.reader.kind == "embedding"}
        chains: dict[str, Any] = {}
        for piece in replacements:
            for layer in piece.layers:
                if layer.name not in chains:
                    chains[layer.name] = self._chain(layer, tuned.integers(layer), layer.name in tables)
            self._put(piece, [chains[layer.name] for layer in piece.layers])
        self._model.validate_nodes_and_infer_types()
        save(self._model, out / self.path.name)

    def dequantize(self, replacements: Sequence[Replacement], tuned: TunedLayers, out: Path) -> None:
        """Put the integers' floats in the place of the constants themselves and write the graph, to compare with.

        Args:
            replacements: as found in this very graph or an equal one.
            tuned: the integers.
            out: folder to write to.
        """
        own = {constant.name: constant for constant in self.constants()}
        for piece in replacements:
            constant = own[piece.constant.name]
            edge = constant.readers[piece.constant.readers.index(piece.reader)].edge
            rows = np.concatenate([tuned.integers(layer).dequantize() for layer in piece.layers])
            values = np.ascontiguousarray(rows.T) if piece.reader.turned else rows
            converted = edge.port.get_node().get_type_name() == "Convert"
            dtype = ov.Type.f32 if converted else constant.handle.get_element_type()
            edge.port.replace_source_output(_constant(values, dtype, f"{constant.name}.dequantized").output(0))
        self._model.validate_nodes_and_infer_types()
        save(self._model, out / self.path.name)

    def stored(self) -> dict[str, PackageLayer]:
        """How each layer was stored by :meth:`quantize`."""
        return self._stored

    def _floats(self) -> Iterator[tuple[str, Any]]:
        for node in self._model.get_ordered_ops():
            if node.get_type_name() == "Constant" and node.get_element_type().get_type_name() in _FLOATS:
                yield node.get_friendly_name(), node

    def _chain(self, layer: Layer, linear: QuantizedLinear, table: bool) -> Any:
        spec = layer.spec
        stored = stored_type(spec, linear.in_features, "embedding" if table else "linear", _DEVICE)
        self._stored[layer.name] = {
            "bits": spec.bits,
            "group_size": spec.group_size,
            "symmetric": spec.symmetric,
            "stored": stored_name(stored, spec),
        }
        return compressed_chain(linear, stored, f"{layer.name}.weight", port=0 if table else 1)

    def _put(self, piece: Replacement, chains: list[Any]) -> None:
        node, dtype = piece.reader.node, piece.reader.edge.dtype
        weights = [chain if dtype == ov.Type.f32 else ops.convert(chain, dtype) for chain in chains]
        if piece.reader.kind == "embedding":
            new = ops.gather(weights[0], node.input_value(1), node.input_value(2))
        else:
            turned = bool(node.get_attributes()["transpose_a"])
            parts = [ops.matmul(node.input_value(0), weight, turned, True) for weight in weights]
            for part, layer in zip(parts, piece.layers, strict=True):
                part.set_friendly_name(layer.name)
            new = parts[0] if len(parts) == 1 else ops.concat(parts, -1)
        _replace(node, new)


def read_back(path: Path, stored: dict[str, PackageLayer]) -> Iterator[tuple[str, QuantizedLinear]]:
    """Integers of the layers, decoded from a written graph."""
    return ((name, found.linear) for name, found in found_layers(path, stored))


def _readers(node: Any, turned: bool, edge: _Edge | None) -> Iterator[Reader]:
    """Who reads a constant, through what only converts or turns it."""
    dtype = node.get_output_element_type(0)
    for port in node.output(0).get_target_inputs():
        user, index = port.get_node(), port.get_index()
        own = _Edge(edge.port if edge else port, dtype)
        kind, label = user.get_type_name(), f"{user.get_type_name()} {user.get_friendly_name()}"
        if kind == "Convert" and user.get_output_element_type(0).get_type_name() in _FLOATS:
            yield from _readers(user, turned, own)
        elif kind == "Transpose" and index == 0 and _constant_values(user, 1) == [1, 0]:
            yield from _readers(user, not turned, own)
        elif kind == "MatMul" and index == 1:
            swapped = bool(user.get_attributes()["transpose_b"])
            yield Reader("linear", turned == swapped, label, user, own)
        elif kind == "Gather" and index == 0 and _constant_values(user, 2) == [0]:
            yield Reader("embedding", turned, label, user, own)
        else:
            yield Reader(None, False, label, user, own)


def _constant_values(node: Any, index: int) -> list[int] | None:
    """Integers that a node gets as a constant."""
    source = node.input_value(index).get_node()
    return np.ravel(source.data).tolist() if source.get_type_name() == "Constant" else None


def _numbers(node: Any) -> NDArray[Any]:
    """Values of a float constant; bfloat16 as its bits."""
    numbers: NDArray[Any] = node.data
    return numbers.view(np.uint16) if node.get_element_type() == ov.Type.bf16 else numbers


def _constant(values: NDArray[np.float32], dtype: Any, name: str) -> Any:
    """A constant that owns these values, rounded to a type."""
    tensor = ov.Tensor(dtype, ov.Shape(list(values.shape)))
    kind = np.dtype(_FLOATS[dtype.get_type_name()])
    target = tensor.data.view(np.uint16) if kind == np.uint16 else tensor.data
    target[...] = as_stored(values, kind)
    node = ov.op.Constant(tensor, True)
    node.set_friendly_name(name)
    return node


def _replace(old: Any, new: Any) -> None:
    """Let everything that reads a node read another, which takes its name over."""
    name, names = old.get_friendly_name(), old.output(0).get_tensor().get_names()
    old.output(0).replace(new.output(0))
    old.set_friendly_name(f"{name}/replaced")
    new.set_friendly_name(name)
    new.output(0).get_tensor().set_names(names)
