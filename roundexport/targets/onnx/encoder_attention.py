"""Attention of encoders: com.microsoft::MultiHeadAttention, or plain operators where it cannot serve.

    mask     int32 [B, S], 1 for tokens and 0 for padding, wherever the padding is
    window   attention_bias [1, 1, S, S]: 0 where |i - j| < window, else the lowest float: one band for all such layers
    causal   the same, 0 where j ≤ i: decoders that are used as embedders, without a cache

Plain operators, for logit soft-capping or keys with fewer heads than queries:

    softmax(cap(scale · q kᵀ) + bias) v          bias = lowest float at padded keys and outside the window
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from roundexport.errors import UnsupportedError
from roundexport.graph.capture import Capture
from roundexport.graph.placeholders import AttentionInfo

from .decoder_attention import mask_input
from .graph import MICROSOFT, PLACEHOLDER, Dim, Editor, dims, integer, optional
from .reshapes import heads_first, heads_last
from .translate import BATCH, NEW

LOWEST = float(np.finfo(np.float32).min)
_ZERO, _HIDDEN = np.zeros(1, np.float32), np.full(1, LOWEST, np.float32)
_INT32, _BOOL = ir.DataType.INT32, ir.DataType.BOOL


def lower(editor: Editor, captured: Capture, standard: bool = False) -> None:
    """Lower every attention placeholder of an encoder; ``standard``: in plain operators."""
    by_index = {info.index: info for info in captured.attentions}
    shared = _Shared(editor)
    for node in editor.nodes("attention", PLACEHOLDER):
        info = by_index[integer(node, "index")]
        mask, given, sinks = (optional(node, place) for place in (3, 4, 5))
        if mask is not None:
            mask_input(node)
        if sinks is not None:
            raise UnsupportedError(f"attention layer {info.index}: sinks are only exported with a KV cache")
        if standard or info.softcap or info.num_kv_heads != info.num_heads:
            output = _plain(editor, node, info, shared, given)
            editor.log.fusions["attention in plain operators"] += 1
        else:
            output = _operator(editor, node, info, shared, given)
            editor.log.fusions["multi-head attention"] += 1
        editor.replace(node.outputs[0], output)
        editor.remove(node)


class _Shared:
    """Masks that layers share, each added once at the start of the graph."""

    def __init__(self, editor: Editor) -> None:
        self._editor = editor
        self._mask = next((value for value in editor.graph.inputs if value.name == "attention_mask"), None)
        self._start = editor.first()
        self._padding: ir.Value | None = None
        self._bands: dict[tuple[int, bool], ir.Value] = {}

    def padding(self) -> ir.Value | None:
        """The attention mask as int32 [B, S]; None where there is no padding."""
        if self._padding is None and self._mask is not None:
            (self._padding,) = self._editor.insert(
                self._start, "Cast", [self._mask], [(BATCH, NEW)], {"to": int(_INT32)}, dtype=_INT32
            )
        return self._padding

    def band(self, window: int, causal: bool) -> ir.Value:
        """Additive bias [1, 1, S, S] that hides keys at a distance of ``window`` and more, and later ones if causal."""
        if (window, causal) not in self._bands:
            add, start, constant = self._editor.insert, self._start, self._editor.constant
            int64 = ir.DataType.INT64
            (shape,) = add(start, "Shape", [self._mask], [(1,)], {"start": 1, "end": 2}, dtype=int64)
            (length,) = add(start, "Squeeze", [shape], [()], dtype=int64)
            zero, one = constant(np.array(0, np.int64)), constant(np.array(1, np.int64))
            (positions,) = add(start, "Range", [zero, length, one], [(NEW,)], dtype=int64)
            (rows,) = add(start, "Unsqueeze", [positions, constant([1])], [(NEW, 1)], dtype=int64)
            (difference,) = add(start, "Sub", [rows, positions], [(NEW, NEW)], dtype=int64)
            rules = []
            if window > 0:
                (distance,) = add(start, "Abs", [difference], [(NEW, NEW)], dtype=int64)
                limit = constant(np.array(window, np.int64))
                rules += add(start, "Less", [distance, limit], [(NEW, NEW)], dtype=_BOOL)
            if causal:
                rules += add(start, "GreaterOrEqual", [difference, zero], [(NEW, NEW)], dtype=_BOOL)
            seen = rules[0] if len(rules) == 1 else add(start, "And", rules, [(NEW, NEW)], dtype=_BOOL)[0]
            (bias,) = add(start, "Where", [seen, constant(_ZERO), constant(_HIDDEN)], [(NEW, NEW)])
            (self._bands[window, causal],) = add(start, "Unsqueeze", [bias, constant([0, 1])], [(1, 1, NEW, NEW)])
        return self._bands[window, causal]

    def padding_bias(self) -> ir.Value | None:
        """Additive bias [B, 1, 1, S] that hides padded keys; None where there is no padding."""
        if self._mask is None:
            return None
        add, start, constant = self._editor.insert, self._start, self._editor.constant
        (seen,) = add(start, "Cast", [self._mask], [(BATCH, NEW)], {"to": int(_BOOL)}, dtype=_BOOL)
        (bias,) = add(start, "Where", [seen, constant(_ZERO), constant(_HIDDEN)], [(BATCH, NEW)])
        (wide,) = add(start, "Unsqueeze", [bias, constant([1, 2])], [(BATCH, 1, 1, NEW)])
        return wide


def _operator(editor: Editor, node: ir.Node, info: AttentionInfo, shared: _Shared, given: ir.Value | None) -> ir.Value:
    flat = [heads_last(editor, node, value) for value in node.inputs[:3]]
    bias = given
    if info.window > 0 or info.causal:
        bias = _sum(editor, node, given, shared.band(info.window, info.causal))
    inputs = [*flat, None, None if optional(node, 3) is None else shared.padding(), bias]
    while inputs[-1] is None:
        inputs.pop()
    batch, length, _ = dims(flat[0]) or (BATCH, NEW, 0)
    shape: tuple[Dim, ...] = (batch, length, info.num_heads * info.value_dim)
    name = f"layers.{info.index}/MultiHeadAttention"
    attributes = {"num_heads": info.num_heads, "scale": info.scale, "mask_filter_value": LOWEST}
    (output,) = editor.insert(node, "MultiHeadAttention", inputs, [shape], attributes, MICROSOFT, name=name)
    return heads_first(editor, node, output, info.num_heads, info.value_dim)


def _plain(editor: Editor, node: ir.Node, info: AttentionInfo, shared: _Shared, given: ir.Value | None) -> ir.Value:
    q, k, v = node.inputs[:3]
    k, v = (_repeat_heads(editor, node, value, info) for value in (k, v))
    batch, heads, length, width = dims(k) or ()
    scores_shape: tuple[Dim, ...] = (batch, info.num_heads, length, length)
    (turned,) = editor.insert(node, "Transpose", [k], [(batch, heads, width, length)], {"perm": [0, 1, 3, 2]})
    (scores,) = editor.insert(node, "MatMul", [q, turned], [scores_shape])
    (scores,) = editor.insert(node, "Mul", [scores, editor.constant(np.array(info.scale, np.float32))], [scores_shape])
    if info.softcap:
        cap = editor.constant(np.array(info.softcap, np.float32))
        for op_type in ("Div", "Tanh", "Mul"):
            inputs = [scores] if op_type == "Tanh" else [scores, cap]
            (scores,) = editor.insert(node, op_type, inputs, [scores_shape])
    bias = _sum(editor, node, given, shared.padding_bias())
    if info.window > 0 or info.causal:
        bias = _sum(editor, node, bias, shared.band(info.window, info.causal))
    if bias is not None:
        (scores,) = editor.insert(node, "Add", [scores, bias], [scores_shape])
    (weights,) = editor.insert(node, "Softmax", [scores], [scores_shape], {"axis": -1})
    (output,) = editor.insert(node, "MatMul", [weights, v], [dims(node.outputs[0])])
    return output


def _sum(editor: Editor, node: ir.Node, first: ir.Value | None, second: ir.Value | None) -> ir.Value | None:
    if first is None or second is None:
        return second if first is None else first
    # Two lowest floats must not overflow to -inf: a row that is all -inf would become NaN in the softmax.
    heads = [(dims(value) or (1, 1))[1] for value in (first, second)]
    shape: tuple[Dim, ...] = (BATCH, heads[0] if heads[1] == 1 else heads[1], NEW, NEW)
    (total,) = editor.insert(node, "Add", [first, second], [shape])
    (bounded,) = editor.insert(node, "Max", [total, editor.constant(_HIDDEN)], [shape])
    return bounded


def _repeat_heads(editor: Editor, node: ir.Node, value: ir.Value, info: AttentionInfo) -> ir.Value:
    """[B, Hkv, S, D] as [B, H, S, D], each head repeated H / Hkv times."""
    if info.num_kv_heads == info.num_heads:
        return value
    repeats = info.num_heads // info.num_kv_heads
    index = editor.constant([head // repeats for head in range(info.num_heads)])
    batch, _, length, width = dims(value) or ()
    shape: tuple[Dim, ...] = (batch, info.num_heads, length, width)
    (wide,) = editor.insert(node, "Gather", [value, index], [shape], {"axis": 1})
    return wide
