"""One run of a decoder graph that gives a longer cache at every step: the standard dialect's.

    past [n, Hkv, P, D] in, present [n, Hkv, P+S, D] out        P: tokens of the longest row

The session's buffers and slots are those of _ort_decoder.py.  The part of them that holds tokens is handed over, and
what the graph put behind it is written back.  Rows that are shorter than P have holes, which attention_mask hides; so
new tokens of all rows are at places P … P+S−1.  A step copies the cache: this form is for portability, not for speed.

Source: targets/onnx/standard/attention.py; tests/targets/test_onnx_standard.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from roundexport.runtime.types import Floats, Ids

from ._ort_graph import Graph


class GrowingBinding:
    """What one run reads and writes; used as the binding of a session whose past and present are one buffer.

    Args:
        graph: the session.
        vocab: width of the logits.
    """

    def __init__(self, graph: Graph, vocab: int) -> None:
        self._graph, self._vocab = graph, vocab
        self._cache: Mapping[str, Floats] = {}
        self._begin = 0

    def step_ids(self, count: int) -> Ids:
        """int64 [n, 1]."""
        return np.zeros((count, 1), np.int64)

    def step_logits(self, count: int) -> Floats:
        """float32 [n, 1, V]."""
        return np.empty((count, 1, self._vocab), np.float32)

    def caches(self, cache: Mapping[str, Floats], states: Mapping[str, Floats], begin: int, end: int) -> None:
        """Let runs read and write slots ``begin`` to ``end`` of these buffers; there are no states here."""
        self._cache, self._begin = cache, begin

    def run(self, ids: Ids, mask: Ids, positions: Ids, logits: Floats, start: int) -> None:
        """One run; ``logits`` [n, S, V] is written.  The mask [n, T] counts all tokens of a row."""
        rows, new = ids.shape
        lengths = mask.sum(1) - new
        width, begin = int(lengths.max()), self._begin
        filled = np.arange(width) < lengths[:, None]
        feeds: dict[str, Any] = {
            **self._graph.tokens(ids),
            "attention_mask": np.concatenate([filled, np.ones((rows, new), bool)], 1).astype(np.int64),
            "position_ids": np.ascontiguousarray(positions),
        }
        feeds = {name: array for name, array in feeds.items() if name in self._graph.inputs}
        for name, array in self._cache.items():
            feeds[f"past_key_values.{name}"] = np.ascontiguousarray(array[begin : begin + rows, :, :width])
        found = self._graph.session.run(["logits", *(f"present.{name}" for name in self._cache)], feeds)
        logits[...] = found[0]
        for array, present in zip(self._cache.values(), found[1:], strict=True):
            for row, length in enumerate(lengths):
                array[begin + row, :, length : length + new] = present[row, :, width:]

    def clear(self) -> None:
        """Let go of the buffers."""
        self._cache = {}
