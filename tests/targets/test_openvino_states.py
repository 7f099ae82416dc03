"""Scans on OpenVINO: Mamba-2's keeps its digits where much is forgotten between two tokens, Mamba's goes by token."""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset15 as ops

from roundexport.targets.openvino.linear_attention import _token_by_token, at_once

HEADS, LENGTH, WIDTH = 2, 64, 8


def test_a_scan_that_forgets_much_is_as_exact_as_its_recurrence():
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((1, HEADS, LENGTH, WIDTH)).astype(np.float32) for _ in range(3))
    past = random.standard_normal((1, HEADS, WIDTH, WIDTH)).astype(np.float32)
    decay = -np.where(random.random((1, HEADS, LENGTH)) < 0.5, 40.0, 0.1).astype(np.float32)
    inputs = [ops.parameter([-1] * value.ndim, np.float32) for value in (q, k, v, decay, past)]
    results = list(at_once(*inputs))
    compiled = ov.Core().compile_model(ov.Model(results, inputs), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found, state = list(compiled([q, k, v, decay, past]).values())
    wanted, left = _recurrence(*(value.astype(np.float64) for value in (q, k, v, decay, past)))
    # Sums from the beginning reach -1300, whose last digit is 2^-13: differences of them are 1e-4 off.
    assert np.abs(found - wanted).max() < 5e-6 * wanted.std()
    assert np.abs(state - left).max() < 5e-6 * left.std()


def test_every_row_of_a_state_may_have_its_own_decay():
    random = np.random.default_rng(1)
    q, k = (random.standard_normal((2, 1, LENGTH, WIDTH)).astype(np.float32) for _ in range(2))  # of all heads
    v = random.standard_normal((2, HEADS, LENGTH, 1)).astype(np.float32)
    past = random.standard_normal((2, HEADS, WIDTH, 1)).astype(np.float32)
    decay = -random.random((2, HEADS, LENGTH, WIDTH)).astype(np.float32)
    inputs = [ops.parameter([-1] * 4, np.float32) for _ in range(5)]
    found, left = _token_by_token(*inputs[:3], [inputs[3]], inputs[4])
    results = [ops.result(found), ops.result(left)]
    compiled = ov.Core().compile_model(ov.Model(results, inputs), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found, state = list(compiled([q, k, v, decay, past]).values())
    everywhere = [np.repeat(value, HEADS, 1).astype(np.float64) for value in (q, k)]
    wanted, left = _recurrence(*everywhere, *(value.astype(np.float64) for value in (v, decay, past)))
    assert np.abs(found - wanted).max() < 5e-6 * wanted.std()
    assert np.abs(state - left).max() < 5e-6 * left.std()


def _recurrence(q, k, v, decay, state):
    found = np.empty_like(v)
    for t in range(q.shape[2]):
        rate = np.exp(decay[:, :, t, None, None] if decay.ndim == 3 else decay[:, :, t, :, None])
        state = state * rate + k[:, :, t, :, None] * v[:, :, t, None, :]
        found[:, :, t] = np.einsum("bhkv,bhk->bhv", state, q[:, :, t])
    return found, state
