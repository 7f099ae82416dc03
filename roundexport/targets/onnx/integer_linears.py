"""Linears of eight-bit inputs, and tables and vectors in integers, where the artifact settles both (`--recipe bct`).

    q = QuantizeLinear(x · 2**-(e[k] - least e), 2**(least e), 128)                uint8
    y = com.microsoft::MatMulIntegerToFloat(q, w8, 2**(least e), scales, 128, , bias)
    w8[k, n] = code[n, k] · 2**(e[k] - least e)                                    int8

e are the exponents of the inputs' blocks of channels (model/integer_inputs.py).  Products and their sums are integers,
the very ones of kernels/integer_linear.py; a sum becomes a float once, by a power of two.

The file holds what the artifact holds: codes of four bits as INT4, a byte per scale (its exponent), biases and norms
as int8.  The nodes that make w8, scales and vectors of them read initializers alone, so ONNX Runtime computes them
once, when it opens the graph, and multiplies int8 matrices from then on.  Tables with more rows than `DECODED` stay
packed: each row is looked up as bytes, and a byte is looked up in a table of its two codes.

A layer whose w8 would leave eight bits is refused.  Measured at the products of MiniLM (onnxruntime 1.31.1, AVX-512
with VNNI, one thread, 64 tokens, K 384, N 384): float32 .191 ms, MatMulNBits .144, this .063, the same with int8
weights in the file .061, with dynamic scales .064.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from roundexport.errors import ArtifactError
from roundexport.kernels._block_format import Format
from roundexport.model.integer_inputs import refuse_unfit
from roundexport.quant import power_of_two
from roundexport.quant.int8_tensor import Int8Tensor
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import LinearInfo

from .graph import MICROSOFT, PLACEHOLDER, Dim, Editor, dims, integer, integers
from .linears import LinearStore, bias, record

INTEGERS_KEY = "roundexport.integers"
"""Metadata of a node: names of the initializers that hold its codes and its scales' bytes."""
FORM = "int4, 8-bit inputs"
RULE = "8-bit inputs"
TABLE_FORM = "uint4 pairs"
DECODED = 4096  # rows up to which a table is decoded when the graph is opened
_ZERO = 128
_NUMBERED = "node_"  # how torch's exporter names a node: by its operator and a number


def lower(editor: Editor, store: LinearStore) -> None:
    """Lower linears whose inputs have a format, and tables beside them; others are left for linears.lower."""
    if not store.weights.integer_inputs:
        return
    for node in editor.all_nodes():
        if node.domain != PLACEHOLDER or node.op_type not in ("linear", "embedding"):
            continue
        maker = _Maker(editor, store, node)
        made = maker.linear() if node.op_type == "linear" else maker.table()
        if made is not None:
            editor.replace(node.outputs[0], made)
            editor.remove(node)
    _Maker(editor, store, editor.first()).vectors()


def lean(editor: Editor) -> None:
    """Leave out what a session infers or nobody reads: shapes between inputs and outputs, names that are numbers.

    They are a third of a graph of integers, and four thousandths of the package.  Names that say which layer a node is
    of stay, but where initializers alone decide its output; values in between are numbered.
    """
    initializers, outputs = list(editor.graph.initializers.values()), set(editor.graph.outputs)
    known, between = set(initializers), []
    for node in editor.graph:
        made = [output for output in node.outputs if output.name]  # one without a name is left out
        if node.inputs and known.issuperset(value for value in node.inputs if value is not None):
            known.update(made)
            node.name = None
        elif (node.name or "").startswith(_NUMBERED):
            node.name = None
        between += [output for output in made if output not in outputs]
    for number, value in enumerate(between):
        value.name = str(number)
    for value in (*initializers, *between):  # of initializers the tensors have them, too
        value.shape, value.type = None, None
        value.metadata_props.clear()


@dataclass(frozen=True)
class _Maker:
    """Makes nodes in front of one node."""

    editor: Editor
    store: LinearStore
    node: ir.Node

    def linear(self) -> ir.Value | None:
        """The output of the linear placeholder; None where this form does not hold it."""
        editor, weights, node = self.editor, self.store.weights, self.node
        infos = [self.store.captured.linears[index] for index in integers(node, "indices")]
        owners = [owner for info in infos if (owner := weights.owner(info.name)) is not None]
        entering = weights.entering(owners[0]) if len(owners) == len(infos) else None
        if entering is None:
            return None
        linears = [weights.quantized(owner) for owner in owners]
        for owner, linear in zip(owners, linears, strict=True):
            refuse_unfit(owner, linear, entering)
        shape, label = dims(node.outputs[0]), _label(owners)
        codes, scales = self._stored(label, linears, packed_as_int4=True)
        weight, columns = self._int8(codes, scales, sum(linear.out_features for linear in linears), entering)
        step = editor.constant(np.array(2.0 ** int(entering.exponents.min()), np.float32), "step")
        zero = editor.constant(np.array(_ZERO, np.uint8), "zero")
        x = self._aligned(node.inputs[0], entering)
        entered = self._made("QuantizeLinear", [x, step, zero], dims(x), dtype=ir.DataType.UINT8)
        inputs = [entered, weight, step, columns, zero, None, self._bias(label, infos)]
        while inputs[-1] is None:
            inputs.pop()
        name = f"{infos[0].name}/MatMulIntegerToFloat"
        (output,) = editor.insert(node, "MatMulIntegerToFloat", inputs, [shape], domain=MICROSOFT, name=name)
        self._note(output, list(zip(owners, infos, strict=True)), codes, scales, FORM)
        editor.log.fusions[RULE] += 1
        return output

    def table(self) -> ir.Value | None:
        """The output of the embedding placeholder; None where this form does not hold it."""
        editor, node = self.editor, self.node
        info = self.store.captured.embeddings[integer(node, "index")]
        owner = self.store.weights.owner(info.name)
        if owner is None or info.shared_with:
            return None
        table = self.store.weights.quantized(owner)
        if (table.spec.bits, table.spec.symmetric, table.spec.scale_dtype) != (4, True, "exponent8"):
            return None
        codes, scales = self._stored(owner, [table], packed_as_int4=False)
        ids, groups, width = node.inputs[0], table.groups, table.in_features
        if len(table.codes) <= DECODED:
            decoded = self._values(codes, scales, groups, width)
            output = self._made("Gather", [decoded, ids], dims(node.outputs[0]), {"axis": 0})
        else:
            leading = dims(ids) or ()
            packed, powers = (
                self._made("Gather", [value, ids], (*leading, count), {"axis": 0}, ir.DataType.UINT8)
                for value, count in ((codes, table.codes.shape[1]), (scales, groups))
            )
            output = self._values(packed, powers, groups, width)
        self._note(output, [(owner, info)], codes, scales, TABLE_FORM)
        editor.log.fusions["tables of integers"] += 1
        return output

    def vectors(self) -> None:
        """Norms' weights and biases that the artifact has in eight bits, in place of the float ones."""
        editor = self.editor
        by_name = self.store.weights.vectors()
        for name, value in list(editor.graph.initializers.items()):
            vector = by_name.get(name.removeprefix("model."))
            if vector is not None and value.const_value is not None and value.dtype == ir.DataType.FLOAT:
                editor.replace(value, self._expanded(f"{name}.codes", vector))

    def _stored(self, label: str, linears: list[QuantizedLinear], packed_as_int4: bool) -> tuple[ir.Value, ir.Value]:
        """Initializers of codes and scales' bytes."""
        codes = np.concatenate([linear.codes for linear in linears])
        scales = power_of_two.to_bytes(np.concatenate([linear.scales for linear in linears]).astype(np.float32))
        packed = (ir.DataType.INT4, (len(codes), linears[0].in_features)) if packed_as_int4 else None
        given = codes ^ np.uint8(0x88) if packed_as_int4 else codes
        names = f"{label}.codes", f"{label}.exponents"
        data = self.store.data
        tensors = data.tensor(names[0], given, packed), data.tensor(names[1], scales)
        first, second = (self.editor.initializer(name, tensor) for name, tensor in zip(names, tensors, strict=True))
        return first, second

    def _int8(self, codes: ir.Value, scales: ir.Value, rows: int, entering: Format) -> tuple[ir.Value, ir.Value]:
        """w8 [K, N] and its columns' scales [N], of codes and bytes."""
        width = entering.width
        numbers = self._made("Cast", [codes], (rows, width), {"to": int(ir.DataType.FLOAT)})
        if (steps := self._steps(entering)) is not None:
            numbers = self._made("Mul", [numbers, steps], (rows, width))
        numbers = self._made("Transpose", [numbers], (width, rows), {"perm": [1, 0]})
        weight = self._made("Cast", [numbers], (width, rows), {"to": int(ir.DataType.INT8)}, ir.DataType.INT8)
        columns = self._made("Reshape", [self._powers(scales, (rows, 1)), self._shape(rows)], (rows,))
        return weight, columns

    def _aligned(self, x: ir.Value, entering: Format) -> ir.Value:
        """Inputs whose channels have one exponent."""
        if (steps := self._steps(entering)) is None:
            return x
        return self._made("Mul", [x, self._made("Reciprocal", [steps], (entering.width,))], dims(x))

    def _steps(self, entering: Format) -> ir.Value | None:
        """2**(e - least e) of every channel [K]; None where all are alike."""
        steps = entering.exponents.astype(np.int32) - int(entering.exponents.min())
        if not steps.any():
            return None
        blocks, block = steps.size, entering.block
        whole = self._made("Expand", [self._powers_of(steps, (blocks, 1)), self._shape(blocks, block)], (blocks, block))
        return self._made("Reshape", [whole, self._shape(entering.width)], (entering.width,))

    def _values(self, codes: ir.Value, scales: ir.Value, groups: int, width: int) -> ir.Value:
        """Values [..., K] of packed codes [..., K/2] and scales' bytes [..., G]."""
        lead = (dims(codes) or ())[:-1]
        kept, cut = [0] * len(lead), (*lead, groups, width // groups)
        pairs = np.stack([np.arange(256) & 15, np.arange(256) >> 4], 1).astype(np.float32) - 8
        index = self._made("Cast", [codes], dims(codes), {"to": int(ir.DataType.INT32)}, ir.DataType.INT32)
        table = self.editor.constant(pairs, "pairs")
        numbers = self._made("Gather", [table, index], (*lead, width // 2, 2), {"axis": 0})
        numbers = self._made("Reshape", [numbers, self._shape(*kept, groups, width // groups)], cut)
        powers = self._powers(scales, (*lead, groups))
        powers = self._made("Unsqueeze", [powers, self.editor.constant([-1])], (*lead, groups, 1))
        numbers = self._made("Mul", [numbers, powers], cut)
        return self._made("Reshape", [numbers, self._shape(*kept, width)], (*lead, width))

    def _bias(self, label: str, infos: list[LinearInfo]) -> ir.Value | None:
        vectors = self.store.weights.vectors()
        found = [vectors.get(f"{info.name}.bias") for info in infos]
        parts = [
            self._expanded(f"{info.name}.bias.codes", vector)
            for info, vector in zip(infos, found, strict=True)
            if vector is not None
        ]
        if len(parts) != len(infos):
            return bias(self.editor, self.store, infos)
        if len(parts) == 1:
            return parts[0]
        return self._made("Concat", parts, (sum(info.out_features for info in infos),), {"axis": 0})

    def _expanded(self, name: str, vector: Int8Tensor) -> ir.Value:
        """A vector of eight bits as floats."""
        codes = self.editor.initializer(name, self.store.data.tensor(name, vector.codes))
        numbers = self._made("Cast", [codes], vector.codes.shape, {"to": int(ir.DataType.FLOAT)})
        scale = self.editor.constant(np.array(vector.scale, np.float32), "scale")
        return self._made("Mul", [numbers, scale], vector.codes.shape)

    def _powers_of(self, exponents: NDArray[np.int32], shape: tuple[int, ...]) -> ir.Value:
        given = power_of_two.to_bytes(np.ldexp(np.float32(1), exponents)).reshape(shape)
        return self._powers(self.editor.constant(given, "exponents"), shape)

    def _powers(self, stored: ir.Value, shape: tuple[Dim, ...]) -> ir.Value:
        """Floats of bytes."""
        index = self._made("Cast", [stored], shape, {"to": int(ir.DataType.INT32)}, ir.DataType.INT32)
        return self._made("Gather", [self._table_of_powers(), index], shape, {"axis": 0})

    def _table_of_powers(self) -> ir.Value:
        return self.editor.constant(power_of_two.from_bytes(np.arange(256, dtype=np.uint8)), "powers")

    def _shape(self, *sizes: int) -> ir.Value:
        return self.editor.constant(list(sizes), "shape")

    def _made(
        self,
        op_type: str,
        inputs: list[ir.Value],
        shape: tuple[Dim, ...] | None,
        attributes: dict[str, object] | None = None,
        dtype: ir.DataType = ir.DataType.FLOAT,
    ) -> ir.Value:
        """The output of one more node."""
        (output,) = self.editor.insert(self.node, op_type, inputs, [shape], attributes, dtype=dtype)
        return output

    def _note(
        self, output: ir.Value, layers: list[tuple[str, LinearInfo]], codes: ir.Value, scales: ir.Value, form: str
    ) -> None:
        """Say which layers a node holds and where, and count them as used."""
        record(output, self.store, layers)
        node = output.producer()
        if node is None:
            raise ArtifactError(f"{layers[0][0]}: its output is made by no node")
        node.metadata_props[INTEGERS_KEY] = json.dumps([codes.name, scales.name])
        for owner, _ in layers:
            self.store.used.append(owner)
            self.store.forms[owner] = form


def _label(owners: list[str]) -> str:
    return owners[0] if len(owners) == 1 else f"{owners[0]}+{len(owners) - 1}"
