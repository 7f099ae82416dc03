"""Rule: attention(q, k, v, mask, bias, …) -> ScaledDotProductAttention, with the KV cache as state in a decoder.

    k ─┐
       Concat(axis 2) ─┬─ Assign                                    one Variable for k and one for v, [B, Hkv, T, D]
    ReadValue ─ Gather(beam_idx)                                    starts as Broadcast(0, [B, Hkv, 0, D])
                       └─ Unsqueeze ─ Broadcast ─ Reshape [B, H, T, D]      only where heads share keys
                                            └─ ScaledDotProductAttention(q, k, v, mask, scale)

Cross-attention keeps what it makes of the encoder's output at the first call after a reset, and never writes to it:

    k ── ReadValue ─┬─ Assign            k is computed where the state is empty, and not again
                    └─ ScaledDotProductAttention

The cache's form is what the CPU plugin fuses with its state (StatefulSDPAFusion), what becomes paged attention, and
where openvino_genai recognizes the cache: the literal 0 in the initial shape.  The cache keeps Hkv heads.

A position bias (buckets of distances) is added to an encoder's mask.  In a decoder the fused operator reads a mask with
a row per head wrongly (2026.4.1: two rows under ALiBi are off by standard deviations), and with attention sinks, its
sixth input, it gives other numbers too; logit soft-capping has no place in it, and paged attention drops its mask, and
chunks with it.  There attention is spelled out from MatMul and Softmax, with the same state; genai then serves it
through its stateful pipeline, and the report says why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
from openvino import opset15 as ops
from openvino.op.util import Variable, VariableInfo

from .graph import Call, Graph, dimension, integer, integers, scalar
from .mask import chunk_mask, padding_mask, shared_mask

if TYPE_CHECKING:
    from roundexport.graph.placeholders import AttentionInfo

PLACEHOLDER = "roundexport.attention.default"
BEAM_IDX = "beam_idx"
PAST = "past"  # what the first layer's cache holds; and the input whose length stands for its


def lower(graph: Graph, call: Call) -> list[Any]:
    """Lower one attention placeholder."""
    (query, key, value), attention_mask = (call.tensor(position) for position in range(3)), call.optional(3)
    info = next(info for info in graph.capture.attentions if info.index == call.index(6))
    if info.kind == "cached":
        batch = graph.once("batch", lambda: dimension(query, 0))
        key = _with_state(graph, f"{info.cache}.key", key, batch, (info.num_kv_heads, info.head_dim))
        value = _with_state(graph, f"{info.cache}.value", value, batch, (info.num_kv_heads, info.value_dim))
    elif info.kind == "cross":
        key = _kept(graph, f"{info.cache}.key", key, (info.num_kv_heads, info.head_dim))
        value = _kept(graph, f"{info.cache}.value", value, (info.num_kv_heads, info.value_dim))
    if info.num_heads != info.num_kv_heads:
        key = _repeat_heads(key, info, info.head_dim)
        value = _repeat_heads(value, info, info.value_dim)
    mask = None
    if attention_mask is not None and info.kind == "cross":
        mask = graph.once(("mask", "cross"), lambda: padding_mask(attention_mask))
    elif attention_mask is not None:
        mask = shared_mask(graph, attention_mask, query, info.window, info.causal)
    bias, sinks = _bias(graph, call, info), call.optional(5)
    if bias is not None and sinks is None and not info.softcap and info.kind != "cached":
        mask, bias = bias if mask is None else ops.add(mask, bias), None
    if bias is None and sinks is None and not info.softcap:
        graph.fusions["cross-attention" if info.kind == "cross" else "attention"] += 1
        scale = scalar(info.scale)
        if mask is None:
            mask = scalar(0.0)
        out = ops.scaled_dot_product_attention(query, key, value, mask, scale, causal=False)
        return list(out.outputs())
    why = "the model caps its attention logits"
    if sinks is not None:
        why = "the model has attention sinks"
    elif info.chunk:
        why = "the model attends in chunks, which paged attention would not"
    elif bias is not None:
        why = "the model adds a position bias"
    graph.refused.append(("attention", f"attention {info.index} is spelled out: {why}"))
    return list(_spelled_out(query, key, value, mask, bias, sinks, info).outputs())


def _bias(graph: Graph, call: Call, info: AttentionInfo) -> Any:
    """What is added to scores beside the mask: the model's bias, or what hides other chunks; None: nothing."""
    bias = call.optional(4)
    if bias is not None or not info.chunk:
        return bias
    name = ("mask", "chunks", info.chunk)
    return graph.once(name, lambda: chunk_mask(call.tensor(3), call.tensor(0), info.chunk))


def _kept(graph: Graph, name: str, made: Any, size: tuple[int, int]) -> Any:
    """Keys or values that a state keeps as they were made at the first call, [B, H, E, D]."""
    variable = _variable(graph, name, size)
    heads, width = size
    kept = ops.read_value(ops.reshape(made, integers(0, heads, -1, width), True), variable)
    graph.sinks.append(ops.assign(kept, variable))
    return kept


def _with_state(graph: Graph, name: str, new: Any, batch: Any, size: tuple[int, int]) -> Any:
    """Past and new keys or values, [B, Hkv, T, D] for a size (Hkv, D); the result is written back to the state."""
    heads, width = size
    variable = _variable(graph, name, size)
    initial = ops.broadcast(scalar(0.0), ops.concat([batch, integers(heads), integers(0), integers(width)], 0))
    past = ops.gather(ops.read_value(initial, variable), beam_idx(graph, batch), integer(0))
    graph.once(PAST, lambda: past)
    everything = ops.concat([past, new], 2)
    graph.sinks.append(ops.assign(everything, variable))
    return everything


def _variable(graph: Graph, name: str, size: tuple[int, int]) -> Any:
    heads, width = size
    description = VariableInfo()
    description.data_shape = ov.PartialShape([-1, heads, -1, width])
    description.data_type = ov.Type.f32
    description.variable_id = f"past_key_values.{name}present.{name}"
    variable = Variable(description)
    graph.variables.append(variable)
    return variable


def beam_idx(graph: Graph, batch: Any) -> Any:
    """0 … B-1 in the place of the ``beam_idx`` input, which the captured program lacks; lowering.py puts it in."""

    def make() -> Any:
        length = ops.squeeze(batch, integers(0))
        return ops.range(integer(0), length, integer(1), ov.Type.i32, name=BEAM_IDX)

    return graph.once(BEAM_IDX, make)


def _repeat_heads(x: Any, info: AttentionInfo, width: int) -> Any:
    """[B, Hkv, T, D] -> [B, H, T, D], each head repeated H/Hkv times."""
    repeats = info.num_heads // info.num_kv_heads
    shape = ops.shape_of(x, ov.Type.i64)
    axes = [ops.gather(shape, integers(axis), integer(0)) for axis in range(4)]
    target = ops.concat([axes[0], axes[1], integers(repeats), axes[2], axes[3]], 0)
    wide = ops.broadcast(ops.unsqueeze(x, integer(2)), target, broadcast_spec="BIDIRECTIONAL")
    return ops.reshape(wide, integers(0, info.num_heads, -1, width), True)


def _spelled_out(query: Any, key: Any, value: Any, mask: Any, bias: Any, sinks: Any, info: AttentionInfo) -> Any:
    scores = ops.matmul(ops.multiply(query, scalar(info.scale)), key, False, True)
    if bias is not None:
        scores = ops.add(scores, bias)
    if info.softcap:
        scores = ops.multiply(ops.tanh(ops.divide(scores, scalar(info.softcap))), scalar(info.softcap))
    scores = ops.add(scores, mask)
    if sinks is None:
        return ops.matmul(ops.softmax(scores, np.int64(-1)), value, False, False)
    leading = ops.concat([dimension(scores, 0), integers(info.num_heads), dimension(scores, 2), integers(1)], 0)
    column = ops.broadcast(ops.reshape(sinks, integers(1, info.num_heads, 1, 1), False), leading)
    shares = ops.softmax(ops.concat([scores, column], -1), np.int64(-1))
    visible = ops.slice(shares, integers(0), integers(-1), integers(1), integers(-1))
    return ops.matmul(visible, value, False, False)
