"""Linears and embeddings in the standard dialect; layout of the weights: weight_layout.py.

    quantized linear     MatMul(x, DequantizeLinear(codes [K, N], scales, zero points)) [+ Add(bias)]
    float linear         MatMul(x, W [K, N]) [+ Add(bias)]
    quantized embedding  Gather(codes [K, V], ids, axis 1) ─ Transpose ─ Cast ─ [Sub] ─ Mul, by group
    float embedding      Gather(table, ids)

A tied lm_head and embedding read the same codes.  Layers are named in the metadata of the node that reads the codes,
and those of an embedding also say which initializers its scales and zero points are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from roundexport.quant.spec import LinearInfo
from roundexport.targets.onnx.graph import PLACEHOLDER, Dim, Editor, dims, integer, integers
from roundexport.targets.onnx.linears import LinearStore, bias, record

from .weight_layout import TYPES, StandardForm, encode, standard_form

PARTS_KEY = "roundexport.parts"


@dataclass(frozen=True)
class _Initializers:
    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None
    form: StandardForm


@dataclass
class _Weights:
    """Quantized weights written so far, by artifact layer."""

    store: LinearStore
    made: dict[str, _Initializers] = field(default_factory=dict)

    def of(self, owner: str) -> _Initializers:
        """Initializers of one weight, written when first asked for."""
        if owner not in self.made:
            self.made[owner] = self._write(owner)
        return self.made[owner]

    def _write(self, owner: str) -> _Initializers:
        store = self.store
        looked_up = any(info.name == owner for info in store.captured.embeddings)
        linear = store.weights.quantized(owner)
        form = standard_form(linear.spec, linear.in_features, looked_up)
        stored = encode(linear, form)
        grid = stored.scales.shape
        codes = self._initializer(f"{owner}.codes", stored.codes, form, (linear.in_features, linear.out_features))
        scales = store.editor.initializer(f"{owner}.scales", store.data.tensor(f"{owner}.scales", stored.scales))
        zero_points = None
        if stored.zero_points is not None:
            zero_points = self._initializer(f"{owner}.zero_points", stored.zero_points, form, grid)
        store.used.append(owner)
        store.forms[owner] = form.describe()
        return _Initializers(codes, scales, zero_points, form)

    def _initializer(
        self, name: str, data: np.typing.NDArray[np.uint8], form: StandardForm, shape: tuple[int, ...]
    ) -> ir.Value:
        if form.bits == 8:
            values = data.view(np.int8 if form.kind == "INT8" else np.uint8).reshape(shape)
            return self.store.editor.initializer(name, self.store.data.tensor(name, values))
        packed = (TYPES[form.kind], shape)
        return self.store.editor.initializer(name, self.store.data.tensor(name, data, packed))


def lower(editor: Editor, store: LinearStore) -> None:
    """Lower every linear and embedding placeholder, in the order of the graph."""
    weights = _Weights(store)
    for node in editor.all_nodes():
        if node.domain != PLACEHOLDER or node.op_type not in ("linear", "embedding"):
            continue
        if node.op_type == "linear":
            (index,) = integers(node, "indices")
            output = _linear(editor, node, weights, store.captured.linears[index])
        else:
            output = _embedding(editor, node, weights, store.captured.embeddings[integer(node, "index")])
        editor.replace(node.outputs[0], output)
        editor.remove(node)


def _linear(editor: Editor, node: ir.Node, weights: _Weights, info: LinearInfo) -> ir.Value:
    store, owner = weights.store, weights.store.weights.owner(info.name)
    matrix = _float_matrix(editor, node, store, info) if owner is None else _matrix(editor, node, weights, info, owner)
    shape = dims(node.outputs[0])
    (output,) = editor.insert(node, "MatMul", [node.inputs[0], matrix], [shape], name=f"{info.name}/MatMul")
    added = bias(editor, store, [info])
    if added is not None:
        (output,) = editor.insert(node, "Add", [output, added], [shape])
    return output


def _matrix(editor: Editor, node: ir.Node, weights: _Weights, info: LinearInfo, owner: str) -> ir.Value:
    """The dequantized weight [K, N]."""
    weight = weights.of(owner)
    inputs = [weight.codes, weight.scales, *([] if weight.zero_points is None else [weight.zero_points])]
    blocks = {"axis": 1} if weight.form.block is None else {"axis": 0, "block_size": weight.form.block}
    name = f"{info.name}/DequantizeLinear"
    (matrix,) = editor.insert(node, "DequantizeLinear", inputs, [dims(weight.codes)], blocks, name=name)
    record(matrix, weights.store, [(owner, info)])
    editor.log.fusions["DequantizeLinear"] += 1
    return matrix


def _float_matrix(editor: Editor, node: ir.Node, store: LinearStore, info: LinearInfo) -> ir.Value:
    """A float weight [K, N]; a table that an embedding reads too is turned in the graph."""
    store.float_layers.append(info.name)
    tied = store.tied_table(info.name)
    if tied is None or store.weights.owner(tied.name) is not None:
        return store.floats(
            f"{info.name}.weight", lambda: np.ascontiguousarray(store.weights.float_weight(info.name).T)
        )
    table = store.table(tied)
    shape: tuple[Dim, ...] = (info.in_features, info.out_features)
    return editor.insert(node, "Transpose", [table], [shape], {"perm": [1, 0]})[0]


def _embedding(editor: Editor, node: ir.Node, weights: _Weights, info: LinearInfo) -> ir.Value:
    store, ids = weights.store, node.inputs[0]
    shape, owner = dims(node.outputs[0]) or (), store.weights.owner(info.name)
    if owner is None:
        store.float_layers.append(info.name)
        return editor.insert(node, "Gather", [store.table(info), ids], [shape], {"axis": 0})[0]
    weight = weights.of(owner)
    leading, kind = shape[:-1], TYPES[weight.form.kind]
    values = _looked_up(editor, node, weight.codes, (*leading, info.in_features), kind)
    groups = (dims(weight.scales) or ())[0] if weight.form.block is not None else 1
    grid: tuple[Dim, ...] = (*leading, groups)
    scales = _looked_up(editor, node, weight.scales, grid, ir.DataType.FLOAT)
    parts = {"scales": weight.scales.name, "form": weight.form.kind}
    (wide,) = editor.insert(node, "Cast", [values], [shape], {"to": int(ir.DataType.FLOAT)})
    cut: tuple[Dim, ...] = (*grid, weight.form.block or info.in_features)
    wide = _shaped(editor, node, wide, cut)
    last = editor.constant([-1])
    if weight.zero_points is not None:
        parts["zero_points"] = weight.zero_points.name
        points = _looked_up(editor, node, weight.zero_points, grid, kind)
        (points,) = editor.insert(node, "Cast", [points], [grid], {"to": int(ir.DataType.FLOAT)})
        (points,) = editor.insert(node, "Unsqueeze", [points, last], [(*grid, 1)])
        (wide,) = editor.insert(node, "Sub", [wide, points], [cut])
    (scales,) = editor.insert(node, "Unsqueeze", [scales, last], [(*grid, 1)])
    (wide,) = editor.insert(node, "Mul", [wide, scales], [cut])
    reader = next(user for user in weight.codes.consumers() if user.op_type == "Gather" and user.inputs[1] is ids)
    record(reader.outputs[0], store, [(owner, info)])
    reader.metadata_props[PARTS_KEY] = json.dumps(parts)
    editor.log.fusions["embedding in plain operators"] += 1
    return _shaped(editor, node, wide, shape)


def _looked_up(editor: Editor, node: ir.Node, table: ir.Value, shape: tuple[Dim, ...], dtype: ir.DataType) -> ir.Value:
    """Columns of a table [R, V] for the ids, as [..., R]; of a table [V] as [..., 1]."""
    ids = node.inputs[0]
    rank = len(dims(table) or ())
    if rank == 1:
        (rows,) = editor.insert(node, "Gather", [table, ids], [shape[:-1]], {"axis": 0}, dtype=dtype)
        return editor.insert(node, "Unsqueeze", [rows, editor.constant([-1])], [shape], dtype=dtype)[0]
    turned = (shape[-1], *shape[:-1])
    (columns,) = editor.insert(node, "Gather", [table, ids], [turned], {"axis": 1}, dtype=dtype)
    perm = [*range(1, len(shape)), 0]
    return editor.insert(node, "Transpose", [columns], [shape], {"perm": perm}, dtype=dtype)[0]


def _shaped(editor: Editor, node: ir.Node, value: ir.Value, shape: tuple[Dim, ...]) -> ir.Value:
    """The same with another cut of what lies behind the axes of the ids."""
    known = [dim for dim in shape if isinstance(dim, int)]
    target = [0] * (len(shape) - len(known)) + known
    return editor.insert(node, "Reshape", [value, editor.constant(target)], [shape])[0]
