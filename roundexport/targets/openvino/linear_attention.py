"""Rule: linear_attention(q, k, v, decay, beta, index, groups, scale) -> a Loop over tokens, or for a whole run at once.

    with beta (the gated delta rule), or a decay for every row of the state (Mamba)     Loop, one token an iteration
    without (Mamba-2's scan)             products over the run: with c_ts = decay_(s+1) + … + decay_t,
                                             o_t = e^(c_t0)·Sᵀ q_t + Σ_(s ≤ t) e^(c_ts) (q_t·k_s) v_s
                                             S'  = e^(c_T0)·S + Σ_s e^(c_Ts) k_s ⊗ v_s

The products take S × S numbers per head, as attention does; a run of one token is one step of the recurrence.  The
runtime reads long prompts in pieces.  Every c_ts is summed by itself, as transformers does it: as a difference of two
sums from the beginning, which is shorter, it lost the digits that the larger sum has no room for, and logits of a run
of 60 tokens were off by up to 5e-4 of their standard deviation.

Limits: the CPU plugin (2026.4.1) has a GatedDeltaNet operator, but keeps this loop as a TensorIterator.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as ops

from .graph import Call, Graph, dimension, integer, integers, scalar
from .states import State

PLACEHOLDER = "roundexport.linear_attention.default"


def lower(graph: Graph, call: Call) -> list[Any]:
    """Lower one layer's linear attention."""
    q, k, v, decay = (call.tensor(position) for position in range(4))
    beta, info, scale = call.optional(4), graph.capture.states[call.index(5)], call.number(7)
    heads, width, value_width = info.shape
    times = heads // call.index(6)
    state = State(graph, info, v)
    by_row = len(decay.get_partial_shape()) == 4
    shared = by_row and times == heads  # one q and k for all heads, which need not be copied
    size = (1 if shared else heads, width)
    q, k = (_heads_first(x, 1 if shared else times, size) for x in (ops.multiply(q, scalar(scale)), k))
    v = _heads_first(v, 1, (heads, value_width))
    decay = ops.transpose(decay, integers(0, 2, 1, 3) if by_row else integers(0, 2, 1))
    if beta is None and not by_row:
        found, new = at_once(q, k, v, decay, state.past)
    else:
        rates = [decay, *([] if beta is None else [ops.transpose(beta, integers(0, 2, 1))])]
        found, new = _token_by_token(q, k, v, rates, state.past)
    state.keep(new)
    graph.fusions["linear attention"] += 1
    return list(ops.transpose(found, integers(0, 2, 1, 3)).outputs())


def _heads_first(x: Any, times: int, size: tuple[int, int]) -> Any:
    """[B, S, G, D] as [B, H, S, D] for a size (H, D), each of the G heads so many times in a row."""
    if times > 1:
        x = ops.tile(ops.unsqueeze(x, integer(3)), integers(1, 1, 1, times, 1))
    x = ops.reshape(x, integers(0, 0, *size), True)
    return ops.transpose(x, integers(0, 2, 1, 3))


def at_once(q: Any, k: Any, v: Any, decay: Any, past: Any) -> tuple[Any, Any]:
    """The scan of a whole run.

    Args:
        q: [B, H, S, Dk], scaled.
        k: [B, H, S, Dk].
        v: [B, H, S, Dv].
        decay: [B, H, S].
        past: the state before it [B, H, Dk, Dv].

    Returns:
        Outputs [B, H, S, Dv] and the state behind them.
    """
    each = ops.unsqueeze(decay, integer(3))  # [B, H, S, 1]
    passed = ops.cumsum(each, integer(2))
    length = ops.squeeze(dimension(decay, 2), integers(0))
    places = ops.range(integer(0), length, integer(1), ov.Type.i64)
    behind = ops.greater(ops.unsqueeze(places, integer(1)), ops.unsqueeze(places, integer(0)))  # t > s
    later = ops.greater(ops.unsqueeze(places, integer(0)), ops.unsqueeze(places, integer(1)))
    sums = ops.cumsum(ops.select(behind, each, scalar(0.0)), integer(2))  # [B, H, t, s]: decay_(s+1) + … + decay_t
    between = ops.exp(ops.select(later, scalar(-np.inf), sums))
    scores = ops.multiply(ops.matmul(q, k, False, True), between)
    kept = ops.matmul(ops.multiply(q, ops.exp(passed)), past, False, False)
    found = ops.add(ops.matmul(scores, v, False, False), kept)
    last = integers(-1)
    left = ops.transpose(ops.gather(sums, last, integer(2)), integers(0, 1, 3, 2))  # [B, H, s, 1]
    entering = ops.multiply(k, ops.exp(left))
    total = ops.exp(ops.gather(passed, last, integer(2)))  # [B, H, 1, 1]
    new = ops.add(ops.multiply(past, total), ops.matmul(entering, v, True, False))
    return found, new


def _token_by_token(q: Any, k: Any, v: Any, rates: list[Any], past: Any) -> tuple[Any, Any]:
    """The same with decay [B, H, S] or [B, H, S, Dk], and by the delta rule where beta [B, H, S] comes behind it."""
    shape = ops.shape_of(v, ov.Type.i64)
    empty = ops.broadcast(scalar(0.0), shape)
    count = ops.convert(ops.gather(shape, integer(2), integer(0)), ov.Type.i32)
    time = ops.parameter([], np.int32, name="time")
    tokens = [ops.parameter([-1, -1, 1, -1], np.float32, name=name) for name in "qkv"]
    by_row = len(rates[0].output(0).get_partial_shape()) == 4
    decay = ops.parameter([-1, -1, 1, -1] if by_row else [-1, -1, 1], np.float32, name="decay")
    beta = [ops.parameter([-1, -1, 1], np.float32, name="beta") for _ in rates[1:]]
    state, found = (ops.parameter([-1, -1, -1, -1], np.float32, name=name) for name in ("state", "found"))
    query, key, value = (ops.squeeze(x, _i32(2)) for x in tokens)
    rate = ops.squeeze(decay, _i32(2)) if by_row else decay
    decayed = ops.multiply(state, ops.unsqueeze(ops.exp(rate), _i32(-1)))
    entering = value
    for share in beta:
        known = ops.reduce_sum(ops.multiply(decayed, ops.unsqueeze(key, _i32(-1))), _i32(-2), False)
        entering = ops.multiply(ops.subtract(value, known), share)
    added = ops.multiply(ops.unsqueeze(key, _i32(-1)), ops.unsqueeze(entering, _i32(-2)))
    after = ops.add(decayed, added)
    told = ops.reduce_sum(ops.multiply(after, ops.unsqueeze(query, _i32(-1))), _i32(-2), True)
    filled = ops.scatter_update(found, ops.unsqueeze(time, _i32(0)), told, _i32(2))
    going = ops.constant([True], dtype=bool)
    inner = [*tokens, decay, *beta]
    body = ov.Model([going, after, filled], [time, *inner, state, found], "one token")
    loop = ops.loop(count, ops.constant(True, dtype=bool))
    loop.set_function(body)
    for parameter, outer in zip(inner, [q, k, v, *rates], strict=True):
        loop.set_sliced_input(parameter, outer.output(0) if hasattr(outer, "output") else outer, 0, 1, 1, -1, 2)
    loop.set_merged_input(state, past.output(0), after.output(0))
    loop.set_merged_input(found, empty.output(0), filled.output(0))
    loop.set_special_body_ports([0, 0])
    found, after = (loop.get_iter_value(value.output(0), -1) for value in (filled, after))
    return found, ops.reshape(after, integers(0, 0, 0, 0), True)


def _i32(value: int) -> Any:
    return ops.constant(np.array(value, np.int32))
