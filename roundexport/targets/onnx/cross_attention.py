"""Attention of a decoder that also looks at what an encoder gave (graph/halves.py, ``cross``).

    its own tokens    com.microsoft::GroupQueryAttention with past_key_values.<i>.decoder.key|value, all rows of one
                      length, which is the past's:      seqlens_k = P + S - 1      total_sequence_length = P + S
    the encoder       com.microsoft::MultiHeadAttention of q [B, S, H·D] and past_key_values.<i>.encoder.key|value
                      [B, H, E, D], with encoder_attention_mask as key padding; made once, by the encoder

``past`` of the captured program, of which only the length counts, becomes the length of the first layer's past keys.

Source: operator schemas of onnxruntime 1.31.1; tests/targets/test_pair_packages.py.
"""

from __future__ import annotations

import onnx_ir as ir

from roundexport.errors import UnsupportedError
from roundexport.graph import halves
from roundexport.graph.capture import Capture
from roundexport.graph.placeholders import AttentionInfo

from .decoder_attention import PAST_NAME, Shared, check_layer, lower_cached, shared_of
from .encoder_attention import LOWEST
from .graph import MICROSOFT, PLACEHOLDER, Dim, Editor, dims, integer
from .reshapes import heads_first, heads_last
from .rotary_tables import RotaryTables
from .translate import BATCH, SOURCE

_INT32, _INT64 = ir.DataType.INT32, ir.DataType.INT64


def lower(editor: Editor, captured: Capture, tables: RotaryTables) -> None:
    """Lower every attention placeholder of a decoder's half."""
    by_index = {info.index: info for info in captured.attentions}
    for info in captured.attentions:
        if info.kind == "cached":
            check_layer(info)
    shared = _lengths(editor)
    padding = _padding(editor)
    for node in editor.nodes("attention", PLACEHOLDER):
        info = by_index[integer(node, "index")]
        if info.kind == "cached":
            lower_cached(editor, node, info, shared, tables)
        else:
            _lower_cross(editor, node, info, padding)
    _measure_past(editor, next(info for info in captured.attentions if info.kind == "cached"))
    _in_order_of_layers(editor)


def _in_order_of_layers(editor: Editor) -> None:
    """Caches layer by layer, a layer's own before the encoder's: optimum goes by their order."""
    caches = [value for value in editor.graph.inputs if str(value.name).startswith("past_key_values.")]
    for value in caches:
        editor.graph.inputs.remove(value)
    editor.graph.inputs.extend(sorted(caches, key=_place))


def _place(value: ir.Value) -> tuple[int, str, str]:
    _, layer, whose, part = str(value.name).split(".")
    return int(layer), whose, part


def _lengths(editor: Editor) -> Shared:
    """How long every row is, from the lengths of ``past`` and of the new tokens."""
    inputs = {value.name: value for value in editor.graph.inputs}
    start, ids = editor.first(), inputs["input_ids"]
    one = editor.constant([1])
    (past,) = editor.insert(start, "Shape", [inputs[halves.PAST]], [(1,)], {"start": 0, "end": 1}, dtype=_INT64)
    (new,) = editor.insert(start, "Shape", [ids], [(1,)], {"start": 1, "end": 2}, dtype=_INT64)
    (rows,) = editor.insert(start, "Shape", [ids], [(1,)], {"start": 0, "end": 1}, dtype=_INT64)
    (length,) = editor.insert(start, "Add", [past, new], [(1,)], dtype=_INT64)
    (last,) = editor.insert(start, "Sub", [length, one], [(1,)], dtype=_INT64)
    (each,) = editor.insert(start, "Expand", [last, rows], [(BATCH,)], dtype=_INT64)
    (seqlens,) = editor.insert(start, "Cast", [each], [(BATCH,)], {"to": int(_INT32)}, dtype=_INT32)
    (scalar,) = editor.insert(start, "Squeeze", [length], [()], dtype=_INT64)
    (total,) = editor.insert(start, "Cast", [scalar], [()], {"to": int(_INT32)}, dtype=_INT32)
    return shared_of(editor, start, seqlens, total, scalar)


def _padding(editor: Editor) -> ir.Value | None:
    """The encoder's mask as int32 [B, E]; None where nothing is padding."""
    mask = next((value for value in editor.graph.inputs if value.name == halves.MASK), None)
    if mask is None:
        return None
    (padding,) = editor.insert(
        editor.first(), "Cast", [mask], [(BATCH, SOURCE)], {"to": int(_INT32)}, dtype=_INT32, name="encoder_padding"
    )
    return padding


def _lower_cross(editor: Editor, node: ir.Node, info: AttentionInfo, padding: ir.Value | None) -> None:
    where = f"cross-attention of layer {info.cache.partition('.')[0]}"
    if info.softcap or info.window > 0 or info.num_kv_heads != info.num_heads or info.causal:
        raise UnsupportedError(f"{where}: only plain cross-attention is exported")
    if any(value is not None for value in node.inputs[4:]):
        raise UnsupportedError(f"{where}: a position bias or sinks are not exported there")
    length = (dims(node.inputs[0]) or ())[2]
    shape: tuple[Dim, ...] = (BATCH, length, info.num_heads * info.value_dim)
    inputs = [heads_last(editor, node, node.inputs[0]), *node.inputs[1:3], None, padding]
    while inputs[-1] is None:
        inputs.pop()
    attributes = {"num_heads": info.num_heads, "scale": info.scale, "mask_filter_value": LOWEST}
    name = f"layers.{info.cache}/MultiHeadAttention"
    (out,) = editor.insert(node, "MultiHeadAttention", inputs, [shape], attributes, MICROSOFT, name=name)
    editor.replace(node.outputs[0], heads_first(editor, node, out, info.num_heads, info.value_dim))
    editor.remove(node)
    editor.log.fusions["cross-attention"] += 1


def _measure_past(editor: Editor, first: AttentionInfo) -> None:
    """Put the length of the first layer's past keys in the place of that of ``past``, and take ``past`` out."""
    inputs = {value.name: value for value in editor.graph.inputs}
    past, keys = inputs[halves.PAST], inputs[PAST_NAME.format(first.cache, halves.PARTS[0])]
    (length,) = editor.insert(editor.first(), "Shape", [keys], [(1,)], {"start": 2, "end": 3}, dtype=_INT64)
    for node, _ in list(past.uses()):
        if node.op_type != "Shape":
            raise UnsupportedError(f"{node.name}: the decoder reads more of its cache than its length")
        editor.replace(node.outputs[0], length)
        editor.remove(node)
    editor.graph.inputs.remove(past)
