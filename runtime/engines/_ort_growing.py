"""One run of a decoder graph that gives a longer cache at every step: the standard dialect's.

    past [n, Hkv, P, D] in, present [n, Hkv, P+S, D] out        P: tokens of the longest row

The session's buffers and slots are those of _ort_slots.py.  The part of them that holds tokens is handed over, and
what the graph put behind it is written back.  Rows that are shorter than P have holes, which attention_mask hides; so
new tokens of all rows are at places P … P+S−1.  A step copies the cache: this form is for portability, not for speed.

Source: targets/onnx/standard/attention.py; tests/targets/test_onnx_standard.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from roundexport.runtime.types import Floats, Ids

from ._ort_graph import Graph
from ._ort_slots import Slots


class GrowingBinding:
    """Runs that hand over the cache and write back what is new; a `Binding`.

    Args:
        graph: the opened graph.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def step(self, slots: Slots, tokens: Sequence[int]) -> Floats:
        """Append a token to each of the first slots: logits [n, V]."""
        slots.reserve(max(slots.lengths[: len(tokens)]) + 1)
        return self._run(slots, 0, np.array(tokens, np.int64)[:, None])[:, 0]

    def append(self, slots: Slots, slot: int, tokens: Sequence[int], every: bool) -> Floats:
        """Append tokens to one slot: logits [S, V] behind every token, else [1, V] behind the last one."""
        logits = self._run(slots, slot, np.array([tokens], np.int64))
        return logits[0] if every else logits[0, -1:]

    def clear(self) -> None:
        """Nothing is bound."""

    def _run(self, slots: Slots, begin: int, ids: Ids) -> Floats:
        """Append ids [n, S] to slots from ``begin`` on: logits [n, S, V]."""
        rows, new = ids.shape
        lengths = np.array(slots.lengths[begin : begin + rows])
        width = int(lengths.max())
        filled = np.arange(width) < lengths[:, None]
        feeds: dict[str, Any] = {
            **self._graph.tokens(ids),
            "attention_mask": np.concatenate([filled, np.ones((rows, new), bool)], 1).astype(np.int64),
            "position_ids": lengths[:, None] + np.arange(new),
        }
        feeds = {name: array for name, array in feeds.items() if name in self._graph.inputs}
        for name, array in slots.cache.items():
            feeds[f"past_key_values.{name}"] = np.ascontiguousarray(array[begin : begin + rows, :, :width])
        found = self._graph.session.run(["logits", *(f"present.{name}" for name in slots.cache)], feeds)
        for array, present in zip(slots.cache.values(), found[1:], strict=True):
            for row, length in enumerate(lengths):
                array[begin + row, :, length : length + new] = present[row, :, width:]
        slots.lengths[begin : begin + rows] = [int(length) + new for length in lengths]
        return found[0]  # type: ignore[no-any-return]
