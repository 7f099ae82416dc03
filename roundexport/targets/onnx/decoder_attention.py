"""Attention of decoders: com.microsoft::GroupQueryAttention with the KV cache as graph inputs and outputs.

    past_key_values.<i>.key|value [B, Hkv, P, D]  ──▶  present.<i>.key|value [B, Hkv, P+S, D]

One graph serves prefill and decode.  The operator takes q, k, v as [B, S, heads·D], counts valid tokens per row from
the attention mask (so unequal rows are padded on the right) and, where the rotary placeholders in front have a table,
turns q and k itself (rotary_tables.py says when): `position_ids` is then not needed.  Where q, k and v are the pieces
of one Split, it reads the whole and the Split goes.

    seqlens_k = sum(attention_mask, 1) - 1          total_sequence_length = width of attention_mask

The kernel wants heads of one width for keys and values, a multiple of 8.  Others are filled up with zeros, in the cache
too, and cut again behind the operator: values narrower than keys (latent attention), or widths such as 20.  Attention
sinks are the operator's ``head_sink``; attention in chunks is an ``attention_bias`` that hides other chunks' keys.

Limits of the CPU kernel: several new tokens on a non-empty cache only at batch 1.
Source: operator schema and behavior of onnxruntime 1.31.1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from roundexport.errors import UnsupportedError
from roundexport.graph.capture import Capture
from roundexport.graph.placeholders import AttentionInfo

from .graph import MICROSOFT, PLACEHOLDER, Dim, Editor, dims, integer, made_by, optional
from .reshapes import heads_first, heads_last
from .rotary_tables import RotaryTables
from .translate import BATCH, NEW, PAST, TOTAL

_HIDDEN = -(2.0**120)
PAST_NAME, PRESENT_NAME = "past_key_values.{}.{}", "present.{}.{}"


@dataclass(frozen=True)
class Shared:
    """Values that every layer's attention reads, and the node in front of which such values are made."""

    start: ir.Node
    seqlens: ir.Value
    total: ir.Value
    keys: ir.Value
    chunks: dict[int, ir.Value] = field(default_factory=dict)


def check(captured: Capture) -> None:
    """Refuse what the operator cannot do, before any work.

    Raises:
        UnsupportedError: a layer outside the kernel's limits.
    """
    for info in captured.attentions:
        check_layer(info)


def check_layer(info: AttentionInfo) -> None:
    """Refuse one layer that the operator cannot do.

    Raises:
        UnsupportedError: naming the layer.
    """
    if not info.causal:
        raise UnsupportedError(
            f"attention layer {info.index}: attention that is not causal cannot be exported with a KV cache"
        )


def cache_width(info: AttentionInfo) -> int:
    """Width of a layer's heads in the operator and in its cache."""
    return -(-max(info.head_dim, info.value_dim) // 8) * 8


def lower(editor: Editor, captured: Capture, tables: RotaryTables) -> None:
    """Lower every attention placeholder of a decoder, with its rotary embedding where possible."""
    check(captured)
    shared = _shared_values(editor)
    for node in editor.nodes("attention", PLACEHOLDER):
        info = captured.attentions[integer(node, "index")]
        mask_input(node)
        lower_cached(editor, node, info, shared, tables)


def mask_input(node: ir.Node) -> ir.Value:
    """The graph input that an attention placeholder's mask is, seen through casts and reshapes.

    Raises:
        UnsupportedError: the mask is computed.
    """
    value = node.inputs[3]
    while (maker := value.producer()) is not None and maker.op_type in ("Cast", "Reshape", "Identity"):
        value = maker.inputs[0]
    if value.name != "attention_mask":
        raise UnsupportedError(f"{node.name}: the attention mask is not the model's attention_mask input")
    return value


def pack(editor: Editor) -> None:
    """Let GroupQueryAttention read q, k and v as one value where they are the pieces of one Split."""
    for node in editor.nodes("GroupQueryAttention", MICROSOFT):
        splits = [made_by(value, "Split") for value in node.inputs[:3]]
        if splits[0] is None or any(s is not splits[0] for s in splits):
            continue
        whole = splits[0]
        if list(whole.outputs) != list(node.inputs[:3]) or any(len(o.consumers()) != 1 for o in whole.outputs):
            editor.log.refused.append(("packed qkv", f"{node.name}: the split is not exactly q, k and v"))
            continue
        node.replace_input_with(0, whole.inputs[0])
        node.replace_input_with(1, None)
        node.replace_input_with(2, None)
        editor.remove(whole)
        editor.log.fusions["packed qkv"] += 1


def _shared_values(editor: Editor) -> Shared:
    mask = next(value for value in editor.graph.inputs if value.name == "attention_mask")
    start, int32 = editor.first(), ir.DataType.INT32
    one = editor.constant([1])
    (count,) = editor.insert(start, "ReduceSum", [mask, one], [(BATCH,)], {"keepdims": 0}, dtype=ir.DataType.INT64)
    (less,) = editor.insert(start, "Sub", [count, one], [(BATCH,)], dtype=ir.DataType.INT64)
    (seqlens,) = editor.insert(start, "Cast", [less], [(BATCH,)], {"to": int(int32)}, dtype=int32)
    (width,) = editor.insert(start, "Shape", [mask], [(1,)], {"start": 1, "end": 2}, dtype=ir.DataType.INT64)
    (scalar,) = editor.insert(start, "Squeeze", [width], [()], dtype=ir.DataType.INT64)
    (total,) = editor.insert(start, "Cast", [scalar], [()], {"to": int(int32)}, dtype=int32)
    return shared_of(editor, start, seqlens, total, scalar)


def shared_of(editor: Editor, start: ir.Node, seqlens: ir.Value, total: ir.Value, length: ir.Value) -> Shared:
    """What every layer reads, from how many keys each row has and, as an int64 scalar, how many there are in all."""
    zero, step = (editor.constant(np.array(number, np.int64)) for number in (0, 1))
    (keys,) = editor.insert(start, "Range", [zero, length, step], [(TOTAL,)], dtype=ir.DataType.INT64)
    return Shared(start, seqlens, total, keys)


def lower_cached(editor: Editor, node: ir.Node, info: AttentionInfo, shared: Shared, tables: RotaryTables) -> None:
    """Lower one attention placeholder to the operator with a KV cache."""
    q, k, v = node.inputs[:3]
    width = cache_width(info)
    inside = tables.inside(node, info)
    if inside is not None:
        q, k = inside.q, inside.k
    if width != info.head_dim:
        editor.log.refused.append(
            ("attention", f"attention layer {info.index}: heads of {info.head_dim} are filled up to {width}, slower")
        )
    flat = [heads_last(editor, node, filled_up(editor, node, value, width)) for value in (q, k, v)]
    past, present = cache(editor, info)
    attributes = {
        "num_heads": info.num_heads,
        "kv_num_heads": info.num_kv_heads,
        "scale": info.scale,
        "softcap": info.softcap,
        "local_window_size": info.window,
        "do_rotary": int(inside is not None),
        "rotary_interleaved": int(inside is not None and inside.interleaved),
    }
    shapes = [(BATCH, NEW, info.num_heads * width), *[dims(value) for value in present]]
    sinks = optional(node, 5)
    rotary = (None, None) if inside is None else (inside.cos, inside.sin)
    inputs = [*flat, *past, shared.seqlens, shared.total, *rotary, None, _bias(editor, node, info, shared), sinks]
    while inputs[-1] is None:
        inputs.pop()
    name = f"layers.{info.index}/GroupQueryAttention"
    outputs = editor.insert(node, "GroupQueryAttention", inputs, shapes, attributes, MICROSOFT, name=name)
    for value, output in zip(present, outputs[1:], strict=True):
        output.name = value.name
        editor.graph.outputs.append(output)
    found = heads_first(editor, node, outputs[0], info.num_heads, width)
    if info.value_dim < width:
        cut = [editor.constant(numbers) for numbers in ([0], [info.value_dim], [-1])]
        (found,) = editor.insert(node, "Slice", [found, *cut], [(BATCH, info.num_heads, NEW, info.value_dim)])
    editor.replace(node.outputs[0], found)
    editor.remove(node)
    editor.log.fusions["grouped-query attention"] += 1
    if inside is not None:
        editor.log.fusions["rotary in attention"] += 1


def _bias(editor: Editor, node: ir.Node, info: AttentionInfo, shared: Shared) -> ir.Value | None:
    """The additive position bias at its full size [B or 1, H, S, T]: the operator does not repeat it for queries."""
    given = optional(node, 4)
    if given is None:
        return _chunks(editor, info.chunk, shared) if info.chunk else None
    shape: tuple[Dim, ...] = (dims(given) or (1,))[0], info.num_heads, NEW, TOTAL
    query, start = node.inputs[0], {"start": 2, "end": 3}
    (length,) = editor.insert(node, "Shape", [query], [(1,)], start, dtype=ir.DataType.INT64)
    ones = editor.constant([1, info.num_heads])
    (target,) = editor.insert(
        node, "Concat", [ones, length, editor.constant([1])], [(4,)], {"axis": 0}, dtype=ir.DataType.INT64
    )
    (wide,) = editor.insert(node, "Expand", [given, target], [shape])
    editor.log.fusions["position bias in attention"] += 1
    return wide


def _chunks(editor: Editor, chunk: int, shared: Shared) -> ir.Value:
    """What hides keys of other chunks [B, 1, S, T], one for all layers: rows begin at their first token."""
    if chunk not in shared.chunks:
        positions = next(value for value in editor.graph.inputs if value.name == "position_ids")
        size, start, int64, parts = editor.constant(np.array(chunk, np.int64)), shared.start, ir.DataType.INT64, []
        sides: list[tuple[ir.Value, list[int], tuple[Dim, ...]]] = [
            (positions, [1, 3], (BATCH, 1, NEW, 1)), (shared.keys, [0, 1, 2], (1, 1, 1, TOTAL)),
        ]  # fmt: skip
        for value, axes, shape in sides:
            (number,) = editor.insert(start, "Div", [value, size], [dims(value)], dtype=int64)
            parts += editor.insert(start, "Unsqueeze", [number, editor.constant(axes)], [shape], dtype=int64)
        both: tuple[Dim, ...] = (BATCH, 1, NEW, TOTAL)
        (same,) = editor.insert(start, "Equal", parts, [both], dtype=ir.DataType.BOOL)
        values = [editor.constant(np.full(1, number, np.float32)) for number in (0.0, _HIDDEN)]
        (shared.chunks[chunk],) = editor.insert(start, "Where", [same, *values], [both])
    return shared.chunks[chunk]


def filled_up(editor: Editor, before: ir.Node, value: ir.Value, width: int) -> ir.Value:
    """Heads [B, H, S, D] with zeros behind, ``width`` wide."""
    shape = dims(value) or ()
    if shape[-1] == width:
        return value
    missing = editor.constant([0, 0, 0, 0, 0, 0, 0, width - int(shape[-1])])
    return editor.insert(before, "Pad", [value, missing], [(*shape[:-1], width)])[0]


def cache(editor: Editor, info: AttentionInfo) -> tuple[list[ir.Value], list[ir.Value]]:
    """Past inputs, added to the graph, and stand-ins that carry the names and shapes of the present outputs."""
    past: list[ir.Value] = []
    present: list[ir.Value] = []
    for part in ("key", "value"):
        for names, length, values in ((PAST_NAME, PAST, past), (PRESENT_NAME, TOTAL, present)):
            shape: list[Dim] = [BATCH, info.num_kv_heads, length, cache_width(info)]
            values.append(
                ir.Value(
                    name=names.format(info.cache, part),
                    shape=ir.Shape(shape),
                    type=ir.TensorType(ir.DataType.FLOAT),
                )
            )
    editor.graph.inputs.extend(past)
    return past, present
