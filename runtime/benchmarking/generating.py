"""Greedy tokens of prompts of a fixed length, and the moment at which each was known."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from roundexport.runtime.types import DecoderEngine
from roundexport.runtime.vendor_loop import LoopDecoder

Reply = dict[str, Any]


def timed_generation(
    decoder: DecoderEngine, prompt: Sequence[int], output_len: int, others: Sequence[Sequence[int]] = ()
) -> Reply:
    """Greedy tokens of one prompt, answered together with others, and the time of each."""
    began = time.perf_counter_ns()
    if isinstance(decoder, LoopDecoder):
        written, at = decoder.timed([prompt, *others], output_len)
        return timed_reply(began, written[0], at)
    tokens, times = [], []
    with decoder.start(rows=1 + len(others), expected=len(prompt) + output_len) as session:
        rows = session.add(1 + len(others))
        logits = session.extend(dict(zip(rows, [prompt, *others], strict=True)))
        while True:
            chosen = logits.argmax(-1).tolist()
            times.append(time.perf_counter_ns())
            tokens.append(chosen[0])
            if len(tokens) == output_len:
                break
            logits = session.extend({row: [token] for row, token in zip(rows, chosen, strict=True)})
    return timed_reply(began, tokens, times)


def timed_reply(began: int, tokens: list[int], times: list[int]) -> Reply:
    """The reply to ``generate``; ``began`` and ``times`` are of `time.perf_counter_ns`."""
    return {
        "first_ms": (times[0] - began) / 1e6,
        "step_ms": [(b - a) / 1e6 for a, b in pairwise(times)],
        "tokens": tokens,
    }
