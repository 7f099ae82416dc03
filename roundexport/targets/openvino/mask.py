"""Attention masks, one for each distinct reach, shared by every layer that has it; additive float32, 0 or -2^120.

    causal           [B, 1, S, T]   key ≤ query, and not padding
    causal, window   [B, 1, S, T]   the same, and key > query - window
    chunks           [B, 1, S, T]   both in one chunk; added besides
    bidirectional    [B, 1, 1, T]   not padding
    … with window    [B, 1, S, T]   not padding, and |key - query| < window

T is the length of attention_mask, S of the new tokens, which are the last S of T.  The value hidden keys get is finite,
so that a row that sees nothing, as left padding has, gives a mean and not NaN; and it is far below any score a float32
model has, as scores of models with large activations exceed 65504, float16's lowest, and would not be hidden by it.
-2^120 is exact in bfloat16; where a plugin computes in float16 its own conversion bounds the constant to -65504.

Paged attention drops the mask and keeps a window only where it recognizes how the mask was made.  Of the forms it
knows, the windowed causal mask here takes the one of GPT-OSS and Gemma 3: Greater(key, query + constant) under four
BitwiseAnd, Broadcast, Select and a Slice.  Two of those four repeat a condition only to complete that form.

Source: openvino, sdpa_to_paged_attention/state_management_pattern.cpp (2026), gpt_oss_sliding_window_pattern.
"""

from __future__ import annotations

from typing import Any

import openvino as ov
from openvino import opset15 as ops

from .graph import Graph, dimension, integer, integers, scalar

HIDDEN = -(2.0**120)


def shared_mask(graph: Graph, attention_mask: Any, query: Any, window: int, causal: bool) -> Any:
    """The additive mask for this reach, made at the first request.

    Args:
        graph: the conversion.
        attention_mask: [B, T], true or non-zero where a key is a token.
        query: any layer's query [B, H, S, D]; only its shape is read.
        window: a key is visible at distance < window; -1 means all are.
        causal: whether later keys are hidden.
    """
    return graph.once(("mask", window, causal), lambda: _mask(graph, attention_mask, query, window, causal))


def chunk_mask(attention_mask: Any, query: Any, chunk: int) -> Any:
    """What is added besides so that tokens of a chunk, counted without padding, see each other alone, [B, 1, S, T]."""
    count = ops.cumsum(ops.convert(attention_mask, ov.Type.i64), integer(1))
    number = ops.floor(ops.divide(ops.convert(ops.subtract(count, integer(1)), ov.Type.f32), scalar(float(chunk))))
    new, total = dimension(query, 2), dimension(attention_mask, 1)
    own = ops.slice(number, ops.subtract(total, new), total, integers(1), integers(1))
    return _additive(ops.equal(ops.unsqueeze(own, integers(1, 3)), ops.unsqueeze(number, integers(1, 2))))


def padding_mask(attention_mask: Any) -> Any:
    """The additive mask [B, 1, 1, T] that hides nothing but padding."""
    return _additive(_tokens(attention_mask))


def _mask(graph: Graph, attention_mask: Any, query: Any, window: int, causal: bool) -> Any:
    tokens = graph.once("tokens", lambda: _tokens(attention_mask))
    if not causal and window < 0:
        return _additive(tokens)
    key, position = graph.once(("positions",), lambda: _positions(attention_mask, query))
    if not causal:
        distance = ops.abs(ops.subtract(key, position))
        return _additive(ops.logical_and(ops.less(distance, integer(window)), tokens))
    past = graph.once("causal", lambda: ops.less_equal(key, position))
    if window < 0:
        return _additive(ops.logical_and(past, tokens))
    near = ops.greater(key, ops.add(position, integer(-window)))
    return _recognized_window(past, near, tokens, attention_mask, query)


def _tokens(attention_mask: Any) -> Any:
    """[B, 1, 1, T], true where a key is a token."""
    return ops.unsqueeze(ops.convert(attention_mask, ov.Type.boolean), integers(1, 2))


def _positions(attention_mask: Any, query: Any) -> tuple[Any, Any]:
    """Indices of keys [1, 1, 1, T] and of queries [1, 1, S, 1]."""
    total = ops.squeeze(dimension(attention_mask, 1), integers(0))
    new = ops.squeeze(dimension(query, 2), integers(0))
    key = ops.range(integer(0), total, integer(1), ov.Type.i64)
    position = ops.range(ops.subtract(total, new), total, integer(1), ov.Type.i64)
    return ops.unsqueeze(key, integers(0, 1, 2)), ops.unsqueeze(position, integers(0, 1, 3))


def _recognized_window(past: Any, near: Any, tokens: Any, attention_mask: Any, query: Any) -> Any:
    visible = ops.bitwise_and(past, near)
    visible = ops.bitwise_and(visible, past)
    visible = ops.bitwise_and(tokens, visible)
    visible = ops.bitwise_and(visible, tokens)
    total = dimension(attention_mask, 1)
    shape = ops.concat([dimension(attention_mask, 0), integers(1), dimension(query, 2), total], 0)
    additive = _additive(ops.broadcast(visible, shape))
    return ops.slice(additive, integers(0), total, integers(1), integers(3))


def _additive(visible: Any) -> Any:
    return ops.select(visible, scalar(0.0), scalar(HIDDEN))
