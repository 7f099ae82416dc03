"""Attention of decoders: com.microsoft::GroupQueryAttention with the KV cache as graph inputs and outputs.

    past_key_values.<i>.key|value [B, Hkv, P, D]  ──▶  present.<i>.key|value [B, Hkv, P+S, D]

One graph serves prefill and decode.  The operator takes q, k, v as [B, S, heads·D], counts valid tokens per row from
the attention mask (so unequal rows are padded on the right) and, where the rotary placeholder in front has a table,
turns q and k itself: `position_ids` is then not needed.  Where q, k and v are the pieces of one Split, it reads the
whole and the Split goes.

    seqlens_k = sum(attention_mask, 1) - 1          total_sequence_length = width of attention_mask

Values narrower than keys (latent attention) are filled up with zeros to their width, in the cache too, and cut again
behind the operator.  Attention sinks are the operator's ``head_sink``.

Limits of the CPU kernel: several new tokens on a non-empty cache only at batch 1; head_dim a multiple of 8, of 16 for
the rotary part; value heads as wide as key heads, so wider ones are refused.
Source: operator schema and behavior of onnxruntime 1.31.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from roundexport.errors import UnsupportedError
from roundexport.graph.capture import Capture
from roundexport.graph.placeholders import AttentionInfo

from .graph import MICROSOFT, PLACEHOLDER, Dim, Editor, dims, integer, made_by
from .reshapes import reshape, swap_heads
from .translate import BATCH, NEW, PAST, TOTAL

PAST_NAME, PRESENT_NAME = "past_key_values.{}.{}", "present.{}.{}"


@dataclass(frozen=True)
class _Shared:
    """Values that every layer's attention reads."""

    seqlens: ir.Value
    total: ir.Value
    tables: tuple[tuple[ir.Value, ir.Value], ...]


def check(captured: Capture) -> None:
    """Refuse what the operator cannot do, before any work.

    Raises:
        UnsupportedError: a layer outside the kernel's limits.
    """
    for info in captured.attentions:
        where = f"attention layer {info.index}"
        if info.head_dim % 8:
            raise UnsupportedError(f"{where}: head_dim {info.head_dim} is not a multiple of 8, as ONNX Runtime needs")
        if info.value_dim > info.head_dim:
            raise UnsupportedError(
                f"{where}: values of width {info.value_dim} do not fit the KV cache of keys of width {info.head_dim}"
            )
        if not info.causal:
            raise UnsupportedError(f"{where}: attention that is not causal cannot be exported with a KV cache")


def lower(editor: Editor, captured: Capture, max_context: int) -> None:
    """Lower every attention placeholder of a decoder, with its rotary embedding where possible."""
    check(captured)
    shared = _shared_values(editor, captured, max_context)
    for node in editor.nodes("attention", PLACEHOLDER):
        info = captured.attentions[integer(node, "index")]
        mask_input(node)
        _lower_one(editor, node, info, captured, shared)


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


def _shared_values(editor: Editor, captured: Capture, max_context: int) -> _Shared:
    mask = next(value for value in editor.graph.inputs if value.name == "attention_mask")
    start, int32 = editor.first(), ir.DataType.INT32
    one = editor.constant([1])
    (count,) = editor.insert(start, "ReduceSum", [mask, one], [(BATCH,)], {"keepdims": 0}, dtype=ir.DataType.INT64)
    (less,) = editor.insert(start, "Sub", [count, one], [(BATCH,)], dtype=ir.DataType.INT64)
    (seqlens,) = editor.insert(start, "Cast", [less], [(BATCH,)], {"to": int(int32)}, dtype=int32)
    (width,) = editor.insert(start, "Shape", [mask], [(1,)], {"start": 1, "end": 2}, dtype=ir.DataType.INT64)
    (scalar,) = editor.insert(start, "Squeeze", [width], [()], dtype=ir.DataType.INT64)
    (total,) = editor.insert(start, "Cast", [scalar], [()], {"to": int(int32)}, dtype=int32)
    tables = []
    for number, table in enumerate(captured.rope_tables):
        halves = [
            np.ascontiguousarray(values.numpy()[:max_context, : values.shape[-1] // 2])
            for values in (table.cos, table.sin)
        ]
        names = [f"rotary_{part}.{number}" for part in ("cos", "sin")]
        cos, sin = (editor.initializer(n, ir.tensor(h, name=n)) for n, h in zip(names, halves, strict=True))
        tables.append((cos, sin))
    return _Shared(seqlens, total, tuple(tables))


def _lower_one(editor: Editor, node: ir.Node, info: AttentionInfo, captured: Capture, shared: _Shared) -> None:
    q, k, v = node.inputs[:3]
    rotary: tuple[ir.Value | None, ir.Value | None] = (None, None)
    rope = _absorbable_rope(editor, node, info, captured)
    if rope is not None:
        q, k = rope.inputs[:2]
        rotary = shared.tables[captured.rope_table_of[integer(rope, "index")]]
    if info.value_dim < info.head_dim:
        v = _filled_up(editor, node, v, info)
    flat = [heads_last(editor, node, value) for value in (q, k, v)]
    past, present = _cache(editor, info)
    attributes = {
        "num_heads": info.num_heads,
        "kv_num_heads": info.num_kv_heads,
        "scale": info.scale,
        "softcap": info.softcap,
        "local_window_size": info.window,
        "do_rotary": int(rope is not None),
        "rotary_interleaved": 0,
    }
    shapes = [(BATCH, NEW, info.num_heads * info.head_dim), *[dims(value) for value in present]]
    sinks = node.inputs[5] if len(node.inputs) > 5 else None
    inputs = [*flat, *past, shared.seqlens, shared.total, *rotary, None, _bias(editor, node, info), sinks]
    while inputs[-1] is None:
        inputs.pop()
    name = f"layers.{info.index}/GroupQueryAttention"
    outputs = editor.insert(node, "GroupQueryAttention", inputs, shapes, attributes, MICROSOFT, name=name)
    for value, output in zip(present, outputs[1:], strict=True):
        output.name = value.name
        editor.graph.outputs.append(output)
    found = heads_first(editor, node, outputs[0], info.num_heads, info.head_dim)
    if info.value_dim < info.head_dim:
        cut = [editor.constant(numbers) for numbers in ([0], [info.value_dim], [-1])]
        (found,) = editor.insert(node, "Slice", [found, *cut], [(BATCH, info.num_heads, NEW, info.value_dim)])
    editor.replace(node.outputs[0], found)
    editor.remove(node)
    editor.log.fusions["grouped-query attention"] += 1
    if rope is not None:
        editor.remove(rope)
        editor.log.fusions["rotary in attention"] += 1


def _bias(editor: Editor, node: ir.Node, info: AttentionInfo) -> ir.Value | None:
    """The additive position bias at its full size [B or 1, H, S, T]: the operator does not repeat it for queries."""
    given = node.inputs[4] if len(node.inputs) > 4 else None
    if given is None:
        return None
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


def _filled_up(editor: Editor, before: ir.Node, value: ir.Value, info: AttentionInfo) -> ir.Value:
    """Values [B, Hkv, S, Dv] with zeros behind, as wide as keys."""
    missing = editor.constant([0, 0, 0, 0, 0, 0, 0, info.head_dim - info.value_dim])
    shape: list[Dim] = [*(dims(value) or ())[:-1], info.head_dim]
    return editor.insert(before, "Pad", [value, missing], [shape])[0]


def heads_last(editor: Editor, before: ir.Node, value: ir.Value) -> ir.Value:
    """[B, H, S, D] as [B, S, H·D]."""
    swapped = swap_heads(editor, before, value)
    batch, length, heads, width = dims(swapped) or ()
    return reshape(editor, before, swapped, (batch, length, int(heads) * int(width)))


def heads_first(editor: Editor, before: ir.Node, value: ir.Value, heads: int, width: int) -> ir.Value:
    """[B, S, H·D] as [B, H, S, D]."""
    batch, length, _ = dims(value) or ()
    return swap_heads(editor, before, reshape(editor, before, value, (batch, length, heads, width)))


def _absorbable_rope(editor: Editor, node: ir.Node, info: AttentionInfo, captured: Capture) -> ir.Node | None:
    rope = made_by(node.inputs[0], "rope", PLACEHOLDER)
    if rope is None:
        return None
    reason = None
    if node.inputs[1].producer() is not rope or any(len(o.consumers()) != 1 for o in rope.outputs):
        reason = "its results are used elsewhere too"
    elif integer(rope, "index") not in captured.rope_table_of:
        reason = "its angles depend on more than positions"
    elif info.head_dim % 16:
        reason = f"head_dim {info.head_dim} is not a multiple of 16"
    if reason is not None:
        editor.log.refused.append(("rotary in attention", f"attention layer {info.index}: {reason}"))
        return None
    return rope


def _cache(editor: Editor, info: AttentionInfo) -> tuple[list[ir.Value], list[ir.Value]]:
    """Past inputs, added to the graph, and stand-ins that carry the names and shapes of the present outputs."""
    past: list[ir.Value] = []
    present: list[ir.Value] = []
    for part in ("key", "value"):
        for names, length, values in ((PAST_NAME, PAST, past), (PRESENT_NAME, TOTAL, present)):
            shape: list[Dim] = [BATCH, info.num_kv_heads, length, info.head_dim]
            values.append(
                ir.Value(
                    name=names.format(info.index, part),
                    shape=ir.Shape(shape),
                    type=ir.TensorType(ir.DataType.FLOAT),
                )
            )
    editor.graph.inputs.extend(past)
    return past, present
