"""Linears and embeddings: the placeholders become operators that read the artifact's integers.

    quantized linear      com.microsoft::MatMulNBits(x, B, scales[, zero_points][, bias]), or with `kernels`
                          roundexport.kernels::GroupMatMul(x, B, scales[, zero_points][, bias])
    float linear          MatMul(x, Wᵀ) [+ Add(bias)]
    quantized embedding   com.microsoft::GatherBlockQuantized(B, ids, scales[, zero_points])
    float embedding       Gather(table, ids)

A tied lm_head and embedding read the same initializers (B through a Reshape to two dimensions; a float table through
FusedMatMul with transB).  Every weight is written to the data file when its node is made and forgotten.  Which rows of
which node are which layer is recorded in the node's metadata, from where `readback` takes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from roundexport.formats.package import LAYERS_KEY
from roundexport.kernels.native.library import DOMAIN, OPERATOR
from roundexport.quant.spec import LinearInfo, QuantSpec
from roundexport.targets.weight_source import WeightSource

from .datafile import DataFile
from .graph import MICROSOFT, PLACEHOLDER, Editor, dims, integer, integers
from .kernel_forms import OWN_BLOCK, StoredForm, slow, stored_form
from .weight_layout import encode, stack


@dataclass(frozen=True)
class _Initializers:
    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None
    form: StoredForm


class Tables(Protocol):
    """What the indices of placeholders mean; a `Capture` has it."""

    @property
    def linears(self) -> Sequence[LinearInfo]:
        """By index of a linear."""

    @property
    def embeddings(self) -> Sequence[LinearInfo]:
        """By index of an embedding."""

    @property
    def biased(self) -> Collection[str]:
        """Names of linears with a bias."""

    @property
    def groups(self) -> Sequence[tuple[tuple[int, ...], ...]]:
        """Indices of linears by expert, by index of a placeholder of experts."""


@dataclass(frozen=True)
class AccuracyLevels:
    """Accuracy level of every product, and whose operator runs it.

    Args:
        usual: of most.
        spared: layers whose products keep float32 activations.
        kernels: whether roundexport's own operator runs those of the usual level.
    """

    usual: int
    spared: Collection[str] = ()
    kernels: bool = False

    def of(self, owners: Sequence[str]) -> int:
        """Level of the product of some layers."""
        return 0 if any(owner in self.spared for owner in owners) else self.usual

    def own(self, owners: Sequence[str]) -> bool:
        """Whether roundexport's own operator may run the product of some layers."""
        return self.kernels and self.of(owners) == self.usual


@dataclass
class LinearStore:
    """What the placeholders' indices mean, and the weights written so far.

    Args:
        editor: the graph.
        captured: the tables behind the indices.
        weights: the numbers.
        specs: artifact layer -> scheme.
        data: where weights are written.
        levels: accuracy level of every product, and whose operator runs it.
        merges: whether linears that read one value may become one.
    """

    editor: Editor
    captured: Tables
    weights: WeightSource
    specs: dict[str, QuantSpec]
    data: DataFile
    levels: AccuracyLevels
    merges: bool = True
    used: list[str] = field(default_factory=list)
    forms: dict[str, str] = field(default_factory=dict)
    float_layers: list[str] = field(default_factory=list)
    _written: dict[tuple[str, ...], _Initializers] = field(default_factory=dict)
    _floats: dict[str, ir.Value] = field(default_factory=dict)
    _slow: dict[str, list[str]] = field(default_factory=dict)

    def slow_layers(self) -> list[tuple[str, str]]:
        """What will not run at full speed, one entry per reason."""
        return [
            ("fast kernel", f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}")
            for reason, names in self._slow.items()
        ]

    def name(self, node: ir.Node) -> str:
        """Name of a linear placeholder's first layer."""
        return self.captured.linears[integers(node, "indices")[0]].name

    def merge_key(self, indices: tuple[int, ...]) -> object | None:
        """Equal for linears that can be merged; None for one that cannot."""
        info = self.captured.linears[indices[0]]
        owner = self.weights.owner(info.name)
        if (
            not self.merges or owner is None or owner != info.name
        ):  # a tied weight stays whole, so that both its users can read it
            return None
        entering = self.weights.entering(owner)
        exponents = None if entering is None else tuple(entering.exponents.tolist())
        return info.in_features, self.form(owner, info.in_features), self.own(owner), exponents

    def own(self, owner: str) -> bool:
        """Whether only roundexport's own operator reads a weight; others know neither three bits nor float16 scales."""
        tables = {self.weights.owner(table.name) for table in self.captured.embeddings}
        return self.levels.own((owner,)) and owner not in tables

    def form(self, owner: str, in_features: int) -> StoredForm:
        """How a weight is stored."""
        return stored_form(self.specs[owner], in_features, self.own(owner))

    def tied_table(self, name: str) -> LinearInfo | None:
        """The embedding whose weight this linear shares."""
        return next((table for table in self.captured.embeddings if name in table.shared_with), None)

    def quantized(self, owners: tuple[str, ...], in_features: int, flat: bool = False) -> _Initializers:
        """Initializers of one weight, or of several stacked, written when first asked for; ``flat``: B [N, G·blob]."""
        if owners in self._written:
            return self._written[owners]
        form = self.form(owners[0], in_features)
        stored = stack([encode(self.weights.quantized(owner), form) for owner in owners])
        label = owners[0] if len(owners) == 1 else f"{owners[0]}+{len(owners) - 1}"
        codes = stored.codes.reshape(len(stored.codes), -1) if flat else stored.codes
        parts: dict[str, NDArray[Any] | None] = {
            "codes": codes,
            "scales": self._scales(owners[0], stored.scales, form),
            "zero_points": stored.zero_points,
        }
        values = {
            part: self.editor.initializer(f"{label}.{part}", self.data.tensor(f"{label}.{part}", numbers))
            for part, numbers in parts.items()
            if numbers is not None
        }
        made = _Initializers(values["codes"], values["scales"], values.get("zero_points"), form)
        self._written[owners] = made
        for owner in owners:
            self.used.append(owner)
            self.forms[owner] = form.describe()
            reason = slow(self.specs[owner], form, self.levels.usual)
            if reason is not None:
                self._slow.setdefault(reason, []).append(owner)
        return made

    def _scales(self, owner: str, scales: NDArray[np.float32], form: StoredForm) -> NDArray[Any]:
        """Scales in the artifact's 16 bits where the operator takes them so, else in 32."""
        half = self.specs[owner].scale_dtype == "float16" and self.own(owner) and form.block % OWN_BLOCK == 0
        return scales.astype(np.float16) if half else scales

    def table(self, info: LinearInfo) -> ir.Value:
        """A float embedding [V, K] as initializer; one for all modules that share it."""
        info = self.tied_table(info.name) or info
        return self.floats(f"{info.name}.weight", lambda: self.weights.float_weight(info.name))

    def floats(self, name: str, make: Callable[[], NDArray[np.float32]]) -> ir.Value:
        """A float initializer of this name, written when first asked for; blocks that are run twice share it."""
        if name not in self._floats:
            self._floats[name] = self.editor.initializer(name, self.data.tensor(name, make()))
        return self._floats[name]


def as_lists(editor: Editor) -> None:
    """Let every linear placeholder hold a list of indices, so that merging is appending."""
    for node in editor.nodes("linear", PLACEHOLDER):
        node.attributes["indices"] = ir.AttrInt64s("indices", [integer(node, "index")])


def lower(editor: Editor, store: LinearStore) -> None:
    """Lower every linear and embedding placeholder, in the order of the graph."""
    kinds = {"linear": _lower_linear, "embedding": _lower_embedding}
    for node in editor.all_nodes():
        if node.domain == PLACEHOLDER and node.op_type in kinds:
            editor.replace(node.outputs[0], kinds[node.op_type](editor, node, store))
            editor.remove(node)


def _lower_linear(editor: Editor, node: ir.Node, store: LinearStore) -> ir.Value:
    infos = [store.captured.linears[index] for index in integers(node, "indices")]
    owners = [store.weights.owner(info.name) for info in infos]
    known = tuple(owner for owner in owners if owner is not None)
    if len(known) != len(infos):
        return _float_linear(editor, node, store, infos[0])
    return _quantized_linear(editor, node, store, infos, known)


def _quantized_linear(
    editor: Editor, node: ir.Node, store: LinearStore, infos: list[LinearInfo], owners: tuple[str, ...]
) -> ir.Value:
    weight = store.quantized(owners, infos[0].in_features)
    added = bias(editor, store, infos)
    own = store.levels.own(owners) and weight.form.block % OWN_BLOCK == 0
    inputs = [node.inputs[0], weight.codes, weight.scales, weight.zero_points, *([] if own else [None]), added]
    while inputs[-1] is None:
        inputs.pop()
    attributes = {
        "K": infos[0].in_features,
        "N": sum(info.out_features for info in infos),
        "bits": weight.form.bits,
        "block_size": weight.form.block,
        "accuracy_level": store.levels.of(owners),
    }
    shape = dims(node.outputs[0])
    kind, domain = (OPERATOR, DOMAIN) if own else ("MatMulNBits", MICROSOFT)
    (output,) = editor.insert(node, kind, inputs, [shape], attributes, domain, name=f"{infos[0].name}/{kind}")
    editor.graph.opset_imports[domain] = 1
    record(output, store, [(owner, info) for owner, info in zip(owners, infos, strict=True)])
    editor.log.fusions[kind] += 1
    return output


def record(output: ir.Value, store: LinearStore, layers: list[tuple[str, LinearInfo]]) -> None:
    """Note in the node's metadata which rows are which layer: name, rows, K and dtype of the artifact's scales."""
    node = output.producer()
    if node is not None:
        rows = [[name, i.out_features, i.in_features, store.specs[name].scale_dtype] for name, i in layers]
        node.metadata_props[LAYERS_KEY] = json.dumps(rows)


def bias(editor: Editor, store: LinearStore, infos: list[LinearInfo]) -> ir.Value | None:
    """Biases one below the other, zeros where a layer has none; None where no layer has one."""
    if not any(info.name in store.captured.biased for info in infos):
        return None
    parts = [
        store.weights.bias(info.name) if info.name in store.captured.biased else np.zeros(info.out_features, np.float32)
        for info in infos
    ]
    return store.floats(f"{infos[0].name}.bias", lambda: np.concatenate(parts))


def _float_linear(editor: Editor, node: ir.Node, store: LinearStore, info: LinearInfo) -> ir.Value:
    store.float_layers.append(info.name)
    shape, x = dims(node.outputs[0]), node.inputs[0]
    tied = store.tied_table(info.name)
    if tied is not None and store.weights.owner(tied.name) is None:
        (output,) = editor.insert(
            node, "FusedMatMul", [x, store.table(tied)], [shape], {"transB": 1}, MICROSOFT, name=f"{info.name}/MatMul"
        )
    else:
        value = store.floats(
            f"{info.name}.weight", lambda: np.ascontiguousarray(store.weights.float_weight(info.name).T)
        )
        (output,) = editor.insert(node, "MatMul", [x, value], [shape], name=f"{info.name}/MatMul")
    added = bias(editor, store, [info])
    if added is not None:
        (output,) = editor.insert(node, "Add", [output, added], [shape])
    return output


def _lower_embedding(editor: Editor, node: ir.Node, store: LinearStore) -> ir.Value:
    info = store.captured.embeddings[integer(node, "index")]
    shape, ids = dims(node.outputs[0]), node.inputs[0]
    owner = store.weights.owner(info.name)
    if owner is None:
        store.float_layers.append(info.name)
        (output,) = editor.insert(node, "Gather", [store.table(info), ids], [shape], {"axis": 0})
        return output
    shared = bool((store.tied_table(info.name) or info).shared_with)
    weight = store.quantized((owner,), info.in_features, flat=not shared)
    row_bytes = math.prod(int(dim) for dim in (dims(weight.codes) or ())[1:])
    data = weight.codes
    if shared:
        data = _flat_codes(editor, node, weight.codes, info.out_features, row_bytes)
    width = row_bytes * 8 // weight.form.bits
    inputs = [data, ids, weight.scales, *([] if weight.zero_points is None else [weight.zero_points])]
    attributes = {"bits": weight.form.bits, "block_size": weight.form.block, "gather_axis": 0, "quantize_axis": 1}
    wide = (*(shape or ())[:-1], width)
    name = f"{info.name}/GatherBlockQuantized"
    (output,) = editor.insert(node, "GatherBlockQuantized", inputs, [wide], attributes, MICROSOFT, name=name)
    record(output, store, [(owner, info)])
    editor.log.fusions["GatherBlockQuantized"] += 1
    if width != info.in_features:  # the last block is filled up
        cut = [editor.constant(numbers) for numbers in ([0], [info.in_features], [-1])]
        (output,) = editor.insert(node, "Slice", [output, *cut], [shape])
    return output


def _flat_codes(editor: Editor, before: ir.Node, codes: ir.Value, rows: int, row_bytes: int) -> ir.Value:
    """B [N, G, blob] as the [N, G·blob] that GatherBlockQuantized reads; bytes are untouched."""
    target = editor.constant([rows, row_bytes])
    (data,) = editor.insert(before, "Reshape", [codes, target], [(rows, row_bytes)], dtype=ir.DataType.UINT8)
    return data
