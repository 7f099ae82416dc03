"""Attention of decoders in plain operators, with the KV cache as graph inputs and outputs.

    past_key_values.<i>.key|value [B, Hkv, P, D]  ──▶  present.<i>.key|value [B, Hkv, P+S, D] = past, then new

    softmax(cap(scale · q kᵀ) + bias) v            bias = 0 where a query sees a key, else −2^120

A key is seen by queries of its own place and later ones (places count rows of the cache) where attention_mask [B, P+S]
is 1: padding and holes may be anywhere.  Windows and chunks count tokens, not places.  Keys and values are not repeated
for their groups: the queries of one group are rows of one product, [B, Hkv, H/Hkv·S, D].

Heads of other widths than a multiple of 8, and values narrower than keys, are filled up with zeros, as in the default
dialect; a sink is one more score; attention in chunks hides other chunks' keys.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from roundexport.graph.capture import Capture
from roundexport.graph.placeholders import AttentionInfo
from roundexport.targets.onnx.decoder_attention import cache, cache_width, check, filled_up, mask_input
from roundexport.targets.onnx.graph import PLACEHOLDER, Dim, Editor, dims, integer
from roundexport.targets.onnx.translate import BATCH, NEW, TOTAL

_HIDDEN = -(2.0**120)  # beside any score, and far from what float32 ends at
_INT64, _BOOL = ir.DataType.INT64, ir.DataType.BOOL


def lower(editor: Editor, captured: Capture) -> None:
    """Lower every attention placeholder of a decoder.

    Raises:
        UnsupportedError: a layer that has no KV cache.
    """
    check(captured)
    masks: _Masks | None = None
    for node in editor.nodes("attention", PLACEHOLDER):
        info = captured.attentions[integer(node, "index")]
        mask_input(node)
        past, present = cache(editor, info)
        masks = masks or _Masks(editor, past[0])
        _lower_one(editor, node, info, masks.bias(info.window, info.chunk), (past, present))


class _Masks:
    """Who sees whom, [B, 1, S, T] of 0 and −2^120, once for every window."""

    def __init__(self, editor: Editor, past: ir.Value) -> None:
        self._editor, self._start = editor, editor.first()
        self._made: dict[tuple[int, int], ir.Value] = {}
        mask = next(value for value in editor.graph.inputs if value.name == "attention_mask")
        self._mask = mask
        self._from, begin = self._length(past, 2)
        self._to, end = self._length(mask, 1)
        zero, one = (editor.constant(np.array(value, np.int64)) for value in (0, 1))
        rows = self._add("Range", [begin, end, one], (NEW,))
        places = self._add("Range", [zero, end, one], (TOTAL,))
        column = self._add("Unsqueeze", [rows, editor.constant([1])], (NEW, 1))
        before = self._add("LessOrEqual", [places, column], (NEW, TOTAL), _BOOL)
        kept = self._add("Cast", [mask], (BATCH, TOTAL), _BOOL, to=int(_BOOL))
        kept = self._add("Unsqueeze", [kept, editor.constant([1])], (BATCH, 1, TOTAL), _BOOL)
        self._seen = self._add("And", [before, kept], (BATCH, NEW, TOTAL), _BOOL)

    def bias(self, window: int, chunk: int) -> ir.Value:
        """For layers with this window (−1: none) and attention in chunks of this size (0: none)."""
        key = (window, chunk)
        if key not in self._made:
            shape: tuple[Dim, ...] = (BATCH, NEW, TOTAL)
            seen = self._seen
            for limit in [*([self._near(window)] if window > 0 else []), *([self._same(chunk)] if chunk else [])]:
                seen = self._add("And", [seen, limit], shape, _BOOL)
            shown, hidden = (self._editor.constant(np.full(1, value, np.float32)) for value in (0.0, _HIDDEN))
            bias = self._add("Where", [seen, shown, hidden], shape, ir.DataType.FLOAT)
            one = self._editor.constant([1])
            self._made[key] = self._add("Unsqueeze", [bias, one], (BATCH, 1, NEW, TOTAL), ir.DataType.FLOAT)
        return self._made[key]

    def _near(self, window: int) -> ir.Value:
        """Whether fewer than ``window`` tokens lie between, [B, S, T]."""
        own, others = self._counts()
        distance = self._add("Sub", [own, others], (BATCH, NEW, TOTAL))
        limit = self._editor.constant(np.array(window, np.int64))
        return self._add("Less", [distance, limit], (BATCH, NEW, TOTAL), _BOOL)

    def _same(self, chunk: int) -> ir.Value:
        """Whether both tokens are of one chunk, [B, S, T]."""
        size, one = (self._editor.constant(np.array(number, np.int64)) for number in (chunk, 1))
        numbers = []
        shapes: list[tuple[Dim, ...]] = [(BATCH, NEW, 1), (BATCH, 1, TOTAL)]
        for count, shape in zip(self._counts(), shapes, strict=True):
            numbers.append(self._add("Div", [self._add("Sub", [count, one], shape), size], shape))
        return self._add("Equal", numbers, (BATCH, NEW, TOTAL), _BOOL)

    def _counts(self) -> tuple[ir.Value, ir.Value]:
        """How many tokens there are up to each query [B, S, 1] and to each key [B, 1, T]."""
        constant, one = self._editor.constant, self._editor.constant([1])
        count = self._add("CumSum", [self._mask, constant(np.array(1, np.int64))], (BATCH, TOTAL))
        own = self._add("Slice", [count, self._from, self._to, one], (BATCH, NEW))
        own = self._add("Unsqueeze", [own, constant([2])], (BATCH, NEW, 1))
        return own, self._add("Unsqueeze", [count, one], (BATCH, 1, TOTAL))

    def _length(self, value: ir.Value, axis: int) -> tuple[ir.Value, ir.Value]:
        """Length of an axis, as [1] and as a scalar."""
        length = self._add("Shape", [value], (1,), start=axis, end=axis + 1)
        return length, self._add("Squeeze", [length], ())

    def _add(
        self,
        op_type: str,
        inputs: list[ir.Value],
        shape: tuple[Dim, ...],
        dtype: ir.DataType = _INT64,
        **attributes: int,
    ) -> ir.Value:
        return self._editor.insert(self._start, op_type, inputs, [shape], attributes, dtype=dtype)[0]


def _lower_one(
    editor: Editor,
    node: ir.Node,
    info: AttentionInfo,
    bias: ir.Value,
    kept: tuple[list[ir.Value], list[ir.Value]],
) -> None:
    q, k, v, _, given, sinks = [*node.inputs, None, None][:6]
    width = cache_width(info)
    q, k, v = (filled_up(editor, node, value, width) for value in (q, k, v))
    past, present = kept
    whole = []
    for old, new, stand_in in zip(past, (k, v), present, strict=True):
        (joined,) = editor.insert(node, "Concat", [old, new], [dims(stand_in)], {"axis": 2})
        joined.name = stand_in.name
        editor.graph.outputs.append(joined)
        whole.append(joined)
    found = _attended(editor, node, info, (q, whole[0], whole[1]), [given, bias], sinks)
    if info.value_dim < width:
        cut = [editor.constant(numbers) for numbers in ([0], [info.value_dim], [-1])]
        (found,) = editor.insert(node, "Slice", [found, *cut], [(BATCH, info.num_heads, NEW, info.value_dim)])
    editor.replace(node.outputs[0], found)
    editor.remove(node)
    editor.log.fusions["attention in plain operators"] += 1


def _attended(
    editor: Editor,
    node: ir.Node,
    info: AttentionInfo,
    qkv: tuple[ir.Value, ir.Value, ir.Value],
    biases: list[ir.Value | None],
    sinks: ir.Value | None,
) -> ir.Value:
    """softmax(cap(scale · q kᵀ) + bias) v as [B, H, S, D]."""
    q, k, v = qkv
    heads, groups, width = info.num_heads, info.num_kv_heads, cache_width(info)
    shape: tuple[Dim, ...] = (BATCH, heads, NEW, TOTAL)
    rows = NEW if groups == heads else f"{heads // groups}_{NEW}"  # the queries of a group
    scaled = _by(editor, node, "Mul", q, info.scale)
    if groups != heads:
        scaled = _shaped(editor, node, scaled, [0, groups, -1, width], (BATCH, groups, rows, width))
    (turned,) = editor.insert(node, "Transpose", [k], [(BATCH, groups, width, TOTAL)], {"perm": [0, 1, 3, 2]})
    (scores,) = editor.insert(node, "MatMul", [scaled, turned], [(BATCH, groups, rows, TOTAL)])
    if groups != heads:
        scores = _shaped(editor, node, scores, [0, heads, -1, 0], shape)
    if info.softcap:
        (bent,) = editor.insert(node, "Tanh", [_by(editor, node, "Div", scores, info.softcap)], [shape])
        scores = _by(editor, node, "Mul", bent, info.softcap)
    for added in biases:
        if added is not None:
            (scores,) = editor.insert(node, "Add", [scores, added], [shape])
    weights = _softmax(editor, node, scores, sinks, heads)
    if groups != heads:
        weights = _shaped(editor, node, weights, [0, groups, -1, 0], (BATCH, groups, rows, TOTAL))
    (found,) = editor.insert(node, "MatMul", [weights, v], [(BATCH, groups, rows, width)])
    if groups == heads:
        return found
    return _shaped(editor, node, found, [0, heads, -1, width], (BATCH, heads, NEW, width))


def _softmax(editor: Editor, node: ir.Node, scores: ir.Value, sinks: ir.Value | None, heads: int) -> ir.Value:
    """Over the keys, and the sink where there is one, whose share goes nowhere."""
    shape: tuple[Dim, ...] = (BATCH, heads, NEW, TOTAL)
    if sinks is None:
        return editor.insert(node, "Softmax", [scores], [shape], {"axis": -1})[0]
    one, whole = editor.constant([1]), {"start": 0, "end": 3}
    (leading,) = editor.insert(node, "Shape", [scores], [(3,)], whole, dtype=_INT64)
    (target,) = editor.insert(node, "Concat", [leading, one], [(4,)], {"axis": 0}, dtype=_INT64)
    column = _shaped(editor, node, sinks, [1, heads, 1, 1], (1, heads, 1, 1))
    (wide,) = editor.insert(node, "Expand", [column, target], [(BATCH, heads, NEW, 1)])
    more: tuple[Dim, ...] = (BATCH, heads, NEW, f"{TOTAL}_1")
    (joined,) = editor.insert(node, "Concat", [wide, scores], [more], {"axis": -1})
    (shares,) = editor.insert(node, "Softmax", [joined], [more], {"axis": -1})
    end = editor.constant([np.iinfo(np.int64).max])
    return editor.insert(node, "Slice", [shares, one, end, editor.constant([-1])], [shape])[0]


def _by(editor: Editor, node: ir.Node, op_type: str, value: ir.Value, number: float) -> ir.Value:
    constant = editor.constant(np.array(number, np.float32))
    return editor.insert(node, op_type, [value, constant], [dims(value)])[0]


def _shaped(editor: Editor, node: ir.Node, value: ir.Value, target: list[int], shape: tuple[Dim, ...]) -> ir.Value:
    return editor.insert(node, "Reshape", [value, editor.constant(target)], [shape])[0]
