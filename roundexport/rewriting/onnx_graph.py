"""A float ONNX graph that somebody else made: its constants, who reads them, and integers in their place.

    constant ─[Cast|Identity|Transpose]…─ MatMul, Gemm, FusedMatMul (second input)     a linear
                                        ─ Gather (axis 0, first input)                 an embedding

Such a reader becomes a placeholder of the exporter's own, which its rules then lower (targets/onnx/linears.py, or
standard/linears.py), so the bytes are those of a package.  Rows of a packed constant become one product where they are
stored in one form, else several and a Concat.  Products of float16 and bfloat16 graphs compute in float32 between two
Casts.  Branches and loops are looked into; local functions are inlined first; constants become initializers.

All tensors of a kilobyte and more go to one new data file, so the graph may be of any size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from numpy.typing import NDArray

from roundexport.errors import ArtifactError, UnsupportedError
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import LinearInfo
from roundexport.targets.onnx import linears as fast_linears
from roundexport.targets.onnx.datafile import INLINE_BYTES, DataFile
from roundexport.targets.onnx.graph import MICROSOFT, PLACEHOLDER, Dim, Editor, dims, integer, number
from roundexport.targets.onnx.readback import decode_layers
from roundexport.targets.onnx.settings import STANDARD
from roundexport.targets.onnx.standard import linears as standard_linears
from roundexport.targets.weight_source import WeightSource

from .layers import Layer, TunedLayers
from .matching import FloatConstant, Reader, Replacement, as_stored

_FLOAT = ir.DataType.FLOAT
_FLOATS = (_FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_UNKNOWN = "roundexport_unknown"  # an axis of a shape that the graph does not tell
_STANDARD_OPSET = 21
_LEVELS = fast_linears.AccuracyLevels(4)


@dataclass(frozen=True, eq=False)
class _Edge:
    """Where a constant enters the path to a reader, and the type in which the reader gets it."""

    node: ir.Node
    index: int
    dtype: ir.DataType


class OnnxGraph:
    """A graph in memory, its tensors mapped.

    Args:
        path: the .onnx file.

    Raises:
        ArtifactError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._model = ir.load(path)
        except Exception as error:  # protobuf's and onnx' errors share no base class
            raise ArtifactError(f"{path}: not an ONNX graph, or damaged: {error}") from error
        if self._model.functions:
            passes.InlinePass()(self._model)
        passes.LiftConstantsToInitializersPass()(self._model)
        self._editor = Editor(self._model, prefix="roundexport.")
        self._outputs = {value.name: value.shape for value in self._model.graph.outputs}

    def constants(self) -> list[FloatConstant]:
        """Float matrices of the graph with their readers."""
        return [
            FloatConstant(name, _numbers(value), tuple(_readers(value, False, None)), value)
            for name, value in self._floats()
            if len(value.const_value.shape) == 2 and min(value.const_value.shape) > 0
        ]

    def floats(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Name and values of every float constant, whatever its rank."""
        return ((name, _numbers(value)) for name, value in self._floats())

    def set_floats(self, name: str, values: NDArray[np.float32]) -> None:
        """Give a constant other values, rounded to its type."""
        value = next(value for own, value in self._floats() if own == name)
        value.const_value = _tensor(name, values, value.const_value.dtype)

    def quantize(self, replacements: Sequence[Replacement], tuned: TunedLayers, out: Path, dialect: str) -> None:
        """Put integers in the place of floats and write the graph.

        Args:
            replacements: which readers get which layers.
            tuned: the integers.
            out: folder to write to, under the graph's own name.
            dialect: of OnnxSettings.

        Raises:
            UnsupportedError: the graph's opset is too old for the dialect.
        """
        data = DataFile(out / f"{self.path.name}.data")
        standard = dialect == STANDARD
        self._check_opset(standard)
        tables = _Tables.of(replacements)
        specs = {layer.name: layer.spec for piece in replacements for layer in piece.layers}
        weights = _TunedWeights(tuned)
        store = fast_linears.LinearStore(self._editor, tables, weights, specs, data, _LEVELS, merges=not standard)
        for replacement in replacements:
            self._put_placeholder(replacement, tables, store)
        (standard_linears if standard else fast_linears).lower(self._editor, store)
        self._write(out, data)

    def dequantize(self, replacements: Sequence[Replacement], tuned: TunedLayers, out: Path) -> None:
        """Put the integers' floats in the place of the constants themselves and write the graph, to compare with.

        Args:
            replacements: as found in this very graph or an equal one.
            tuned: the integers.
            out: folder to write to.
        """
        data = DataFile(out / f"{self.path.name}.data")
        own = {constant.name: constant for constant in self.constants()}
        for number_, piece in enumerate(replacements):
            constant = own[piece.constant.name]
            edge = constant.readers[piece.constant.readers.index(piece.reader)].edge
            rows = np.concatenate([tuned.integers(layer).dequantize() for layer in piece.layers])
            values = np.ascontiguousarray(rows.T) if piece.reader.turned else rows
            name = f"roundexport.dequantized.{number_}"
            dtype = _FLOAT if edge.node.op_type == "Cast" else constant.handle.const_value.dtype
            tensor = data.tensor(name, *_bytes(_tensor(name, values, dtype)))
            edge.node.replace_input_with(edge.index, self._editor.initializer(name, tensor))
        self._write(out, data)

    def _floats(self) -> Iterator[tuple[str, Any]]:
        for graph in _graphs(self._model):
            for name, value in graph.initializers.items():
                if value.const_value is not None and value.const_value.dtype in _FLOATS and not value.is_graph_input():
                    yield name, value

    def _check_opset(self, standard: bool) -> None:
        if not standard:
            self._model.graph.opset_imports[MICROSOFT] = 1
            return
        opset = int(self._model.graph.opset_imports.get("", 0))
        if opset < _STANDARD_OPSET:
            raise UnsupportedError(
                f"{self.path}: its opset is {opset}, blocked DequantizeLinear needs {_STANDARD_OPSET}; export the "
                "graph with a newer opset, or take --dialect onnxruntime"
            )
        self._model.ir_version = max(int(self._model.ir_version or 0), 10)

    def _put_placeholder(self, piece: Replacement, tables: _Tables, store: fast_linears.LinearStore) -> None:
        node, editor = piece.reader.node, self._editor
        old, dtype = node.outputs[0], piece.reader.edge.dtype
        if piece.reader.kind == "embedding":
            (layer,) = piece.layers
            ids = node.inputs[1]
            shape = (*(dims(ids) or (_UNKNOWN,)), layer.info.in_features)
            attributes = {"index": tables.embedding(layer), "width": layer.info.in_features}
            (new,) = editor.insert(node, "embedding", [ids], [shape], attributes, PLACEHOLDER)
        else:
            new = self._product(piece, tables, store)
        new = self._cast(node, new, dtype, back=True)
        editor.replace(old, new)
        editor.remove(node)

    def _product(self, piece: Replacement, tables: _Tables, store: fast_linears.LinearStore) -> ir.Value:
        node, editor = piece.reader.node, self._editor
        x = self._cast(node, node.inputs[0], piece.reader.edge.dtype)
        known = dims(node.inputs[0]) or dims(node.outputs[0])
        leading: tuple[Dim, ...] = (_UNKNOWN,) if known is None else known[:-1]
        parts = []
        for together in _runs(piece.layers, tables, store):
            shape = (*leading, sum(layer.info.out_features for layer in together))
            indices = {"indices": [tables.linear(layer) for layer in together]}
            parts += editor.insert(node, "linear", [x], [shape], indices, PLACEHOLDER)
        new = parts[0]
        whole = (*leading, sum(layer.info.out_features for layer in piece.layers))
        if len(parts) > 1:
            (new,) = editor.insert(node, "Concat", parts, [whole], {"axis": -1})
        if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            added = self._cast(node, node.inputs[2], piece.reader.edge.dtype)
            (new,) = editor.insert(node, "Add", [new, added], [whole])
        return new

    def _cast(self, before: ir.Node, value: ir.Value, dtype: ir.DataType, back: bool = False) -> ir.Value:
        """A value of the graph's type as float32, or back."""
        if dtype == _FLOAT:
            return value
        to = dtype if back else _FLOAT
        shape = dims(value) or (_UNKNOWN,)
        return self._editor.insert(before, "Cast", [value], [shape], {"to": int(to)}, dtype=to)[0]

    def _write(self, out: Path, data: DataFile) -> None:
        self._editor.sweep()
        passes.NameFixPass()(self._model)
        for node in self._editor.all_nodes():
            for output in node.outputs:
                if _UNKNOWN in (dims(output) or ()):
                    output.shape = self._outputs.get(output.name) if output.is_graph_output() else None
        for graph in _graphs(self._model):
            for value in graph.initializers.values():
                value.const_value = _settled(value.name, value.const_value, data)
        ir.save(self._model, out / self.path.name)


def read_back(path: Path, layers: Sequence[Layer]) -> Iterator[tuple[str, QuantizedLinear]]:
    """Integers of the layers, decoded from a written graph."""
    return decode_layers(path, {layer.name: layer.spec for layer in layers})


class _TunedWeights(WeightSource):
    """Integers only; whatever is asked for is tuned."""

    def __init__(self, tuned: TunedLayers) -> None:
        self._tuned = tuned

    def owner(self, module: str) -> str | None:
        return module

    def quantized(self, module: str) -> QuantizedLinear:
        return self._tuned.artifact.linear(module)


@dataclass(frozen=True)
class _Tables:
    """What the indices of placeholders mean here; no biases, which stay the graph's own."""

    linears: list[LinearInfo]
    embeddings: list[LinearInfo]
    biased: frozenset[str] = frozenset()
    groups: tuple[tuple[tuple[int, ...], ...], ...] = ()
    _often: tuple[str, ...] = ()

    @classmethod
    def of(cls, replacements: Sequence[Replacement]) -> _Tables:
        """Layers by how they are read; a table that a linear reads too says so by ``shared_with``."""
        read = [(piece.reader.kind, layer) for piece in replacements for layer in piece.layers]
        linears = {layer.name: layer.info for kind, layer in read if kind == "linear"}
        embeddings = {
            layer.name: replace(layer.info, shared_with=(layer.name,) if layer.name in linears else ())
            for kind, layer in read
            if kind == "embedding"
        }
        names = [layer.name for _, layer in read]
        often = tuple(name for name in dict.fromkeys(names) if names.count(name) > 1)
        return cls(list(linears.values()), list(embeddings.values()), _often=often)

    def linear(self, layer: Layer) -> int:
        """Its index."""
        return [info.name for info in self.linears].index(layer.name)

    def embedding(self, layer: Layer) -> int:
        """Its index."""
        return [info.name for info in self.embeddings].index(layer.name)

    def alone(self, layer: Layer) -> bool:
        """Whether nothing else reads this layer, so that it may be stored below another one."""
        return layer.name not in self._often


def _runs(layers: Sequence[Layer], tables: _Tables, store: fast_linears.LinearStore) -> list[list[Layer]]:
    """Layers that follow each other and may be one product."""
    runs: list[tuple[object, list[Layer]]] = []
    for layer in layers:
        key = store.merge_key((tables.linear(layer),)) if tables.alone(layer) else None
        if runs and key is not None and runs[-1][0] == key:
            runs[-1][1].append(layer)
        else:
            runs.append((key, [layer]))
    return [run for _, run in runs]


def _graphs(model: ir.Model) -> list[Any]:
    """The graph and those of its branches and loops."""
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    return list(dict.fromkeys([model.graph, *(node.graph for node in nodes)]))


def _readers(value: ir.Value, turned: bool, edge: _Edge | None) -> Iterator[Reader]:
    """Who reads a constant, through what only copies, casts or turns it."""
    if value.is_graph_output():
        yield Reader(None, False, f"the graph's output {value.name}", None)
    for node, index in value.uses():
        own = _Edge(edge.node if edge else node, edge.index if edge else index, _dtype(value))
        label = f"{node.op_type} {node.name or ''}".strip()
        if node.op_type in ("Cast", "Identity") and node.domain == "" and _dtype(node.outputs[0]) in _FLOATS:
            yield from _readers(node.outputs[0], turned, own)
        elif node.op_type == "Transpose" and node.domain == "":
            yield from _readers(node.outputs[0], not turned, own)
        elif (index == 1 and (swapped := _product_swaps(node)) is not None) and _dtype(value) in _FLOATS:
            yield Reader("linear", turned == swapped, label, node, own)
        elif node.op_type == "Gather" and index == 0 and integer(node, "axis", 0) == 0:
            yield Reader("embedding", turned, label, node, own)
        else:
            yield Reader(None, False, label, node, own)


def _product_swaps(node: ir.Node) -> bool | None:
    """Whether a plain product turns its second input by itself; None: not a plain product."""
    if node.op_type == "MatMul" and node.domain == "":
        return False
    if (node.op_type, node.domain) in (("Gemm", ""), ("FusedMatMul", MICROSOFT)):
        plain = all(number(node, name) == 1 for name in ("alpha", "beta") if name in node.attributes)
        others = [integer(node, name, 0) for name in ("transA", "transBatchA", "transBatchB")]
        return bool(integer(node, "transB", 0)) if plain and not any(others) else None
    return None


def _dtype(value: ir.Value) -> ir.DataType | None:
    maker = value.producer()
    if maker is not None and maker.op_type == "Cast":
        return ir.DataType(integer(maker, "to"))
    if maker is not None and maker.op_type in ("Transpose", "Identity"):
        return _dtype(maker.inputs[0])
    return value.const_value.dtype if value.const_value is not None else value.dtype


def _numbers(value: ir.Value) -> NDArray[Any]:
    """Values of a float constant; bfloat16 as its bits."""
    numbers: NDArray[Any] = value.const_value.numpy()
    return numbers.view(np.uint16) if value.const_value.dtype == ir.DataType.BFLOAT16 else numbers


def _tensor(name: str, values: NDArray[np.float32], dtype: ir.DataType) -> ir.TensorProtocol:
    """A tensor of these values, rounded to a type."""
    if dtype == ir.DataType.BFLOAT16:
        return ir.tensor(as_stored(values, np.dtype(np.uint16)).view(dtype.numpy()), name=name)
    return ir.tensor(as_stored(values, dtype.numpy()), name=name)


def _bytes(tensor: ir.TensorProtocol) -> tuple[NDArray[np.uint8], tuple[ir.DataType, tuple[int, ...]]]:
    """A tensor's bytes, and what they hold."""
    return np.frombuffer(tensor.tobytes(), np.uint8), (tensor.dtype, tuple(tensor.shape))


def _settled(name: str, tensor: Any, data: DataFile) -> Any:
    """A tensor in the new data file where it is large, in memory where it is small."""
    if tensor is None or tensor.dtype == ir.DataType.STRING:
        return tensor
    if isinstance(tensor, ir.ExternalTensor) and Path(tensor.path) == data.path:
        return tensor
    if tensor.nbytes >= INLINE_BYTES:
        return data.tensor(name, *_bytes(tensor))
    return (
        ir.tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=name)
        if isinstance(tensor, ir.ExternalTensor)
        else tensor
    )
