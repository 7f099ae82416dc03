"""Runs of a decoder graph whose past and present are one buffer: arrays are bound once and written into.

GroupQueryAttention writes new keys and values behind a row's last valid one, in place, and takes each row's length from
the sum of its mask.  A decode step of n rows therefore needs four small arrays, and all of them stay where they are:

    input_ids [n, 1]   attention_mask [n, W]   position_ids [n, 1]   logits [n, 1, V]        or inputs_embeds [n, 1, H]

W is the longest row's length, rounded up to `WIDTH`: the mask counts tokens and does not say where they are, so zeros
behind them change nothing (tests/runtime/test_sessions.py).  A step sets one element of each row's mask; arrays are
made and bound anew when the number of rows, W or a buffer changes, and not in between.  Shapes that stay the same also
let ONNX Runtime use its plan of the memory again.

Logits of a long prompt cost a product with the whole vocabulary per token.  A graph may have an initializer
``logits_start`` (int64 [1], 0), overridden with −1 where only the last position's are wanted.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from roundexport.runtime.axis_positions import AXES, positions
from roundexport.runtime.types import Floats, Ids
from roundexport.types import EMBEDS

from ._ort_graph import Graph
from ._ort_slots import Slots

WIDTH = 64  # masks of a step are multiples of this wide


class Binding(Protocol):
    """What runs the graph on the first slots, or on one."""

    def step(self, slots: Slots, tokens: Sequence[int]) -> Floats:
        """Append a token to each of the first slots: logits [n, V], a view that the next call overwrites."""

    def append(self, slots: Slots, slot: int, tokens: Sequence[int], every: bool) -> Floats:
        """Append tokens to one slot: logits [S, V] behind every token, else [1, V] behind the last one."""

    def clear(self) -> None:
        """Let go of everything bound."""


class SharedBinding:
    """Runs on buffers that are past and present at once.

    Args:
        graph: the opened graph.
        vocab: width of the logits.
    """

    def __init__(self, graph: Graph, vocab: int) -> None:
        self._step, self._single = (_Bound(graph) for _ in range(2))
        self._graph, self._vocab = graph, vocab
        self._has_start = graph.has_logits_start
        self._start = {at: np.array([at], np.int64) for at in (-1, 0)}
        self._rows = self._width = 0
        self._ones = np.ones((1, 0), np.int64)

    def step(self, slots: Slots, tokens: Sequence[int]) -> Floats:
        """Append a token to each of the first slots: logits [n, V], a view that the next call overwrites."""
        rows, lengths = len(tokens), slots.lengths
        longest = max(lengths[:rows])
        slots.reserve(longest + 1)
        if rows != self._rows or not self._width - WIDTH <= longest < self._width:
            self._arrange(rows, min(longest // WIDTH * WIDTH + WIDTH, slots.capacity))
        self._step.caches(slots, 0, rows)
        axes, places = self._graph.rows if self._graph.axes else None, slots.places
        ids, numbers, mask, marked = self._ids, self._positions, self._mask, self._marked
        for slot in range(rows):
            length = lengths[slot]
            ids[slot, 0] = tokens[slot]
            if axes is None:
                numbers[slot, 0] = length
            else:
                numbers[:, slot] = positions(axes, places[slot], length, tokens[slot : slot + 1])
            if marked[slot] == length:
                mask[slot, length] = 1
            else:
                mask[slot, : length + 1] = 1
                mask[slot, length + 1 :] = 0
            marked[slot] = lengths[slot] = length + 1
        if self._graph.rows is not None:
            self._read[EMBEDS][...] = self._graph.rows(ids)
        self._step.run()
        return self._logits

    def append(self, slots: Slots, slot: int, tokens: Sequence[int], every: bool) -> Floats:
        """Append tokens to one slot, alone: logits [S, V] behind every token, else [1, V] behind the last one."""
        past, new = slots.lengths[slot], len(tokens)
        slots.lengths[slot] = total = past + new
        if self._ones.shape[1] < total:
            self._ones = np.ones((1, slots.capacity), np.int64)
        last_only = self._has_start and not every
        logits = np.empty((1, 1 if last_only else new, self._vocab), np.float32)
        self._single.caches(slots, slot, slot + 1)
        self._single.bind(
            logits,
            **self._graph.tokens(np.array([tokens], np.int64)),
            attention_mask=self._ones[:, :total],
            position_ids=self._places(slots, slot, past, tokens),
            logits_start=self._start[-1 if last_only else 0],
        )
        self._single.run()
        return logits[0] if every else logits[0, -1:]

    def clear(self) -> None:
        """Let go of everything bound."""
        self._step.clear()
        self._single.clear()
        self._rows = self._width = 0

    def _places(self, slots: Slots, slot: int, past: int, tokens: Sequence[int]) -> Ids:
        """Positions of tokens behind ``past`` others, [1, S] or [3, 1, S]."""
        if self._graph.axes and self._graph.rows is not None:
            return positions(self._graph.rows, slots.places[slot], past, tokens)[:, None]
        return np.arange(past, past + len(tokens), dtype=np.int64)[None]

    def _arrange(self, rows: int, width: int) -> None:
        """Arrays for steps of so many rows, of at most ``width`` tokens each, and bind them."""
        self._rows, self._width = rows, width
        self._ids = np.zeros((rows, 1), np.int64)
        self._positions = np.zeros((AXES, rows, 1) if self._graph.axes else (rows, 1), np.int64)
        self._read = self._graph.tokens(self._ids)
        self._mask, self._marked = np.zeros((rows, width), np.int64), [-1] * rows
        logits = np.empty((rows, 1, self._vocab), np.float32)
        self._logits: Floats = logits[:, 0]
        self._step.bind(
            logits,
            **self._read,
            attention_mask=self._mask,
            position_ids=self._positions,
            logits_start=self._start[-1],
        )


class _Bound:
    """One IO binding of the session, and the arrays that it points into."""

    def __init__(self, graph: Graph) -> None:
        self._io = graph.session.io_binding()
        self._run = graph.session.run_with_iobinding
        self._names = graph.inputs | ({"logits_start"} if graph.has_logits_start else set())
        self._kept: dict[str, tuple[Any, Any]] = {}  # arrays and values that point into them: alive while bound
        self._part: tuple[int, ...] = ()

    def caches(self, slots: Slots, begin: int, end: int) -> None:
        """Bind slots ``begin`` to ``end`` of every buffer as past and present."""
        part = (slots.version, begin, end)
        if part == self._part:
            return
        for past, buffers in (("past_key_values", slots.cache), ("past", slots.states.buffers)):
            for name, array in buffers.items():
                value = self._value(name, array[begin:end])
                self._io.bind_ortvalue_input(f"{past}.{name}", value)
                self._io.bind_ortvalue_output(f"present.{name}", value)
        self._part = part

    def bind(self, logits: Floats, **inputs: Any) -> None:
        """Bind logits [n, S, V], and those inputs that the graph has."""
        for name, array in inputs.items():
            if name in self._names:
                self._io.bind_ortvalue_input(name, self._value(name, array))
        self._io.bind_ortvalue_output("logits", self._value("logits", logits))

    def run(self) -> None:
        """One run on what is bound."""
        self._run(self._io)

    def clear(self) -> None:
        """Let go of everything bound."""
        self._io.clear_binding_inputs()
        self._io.clear_binding_outputs()
        self._kept.clear()
        self._part = ()

    def _value(self, name: str, array: Any) -> Any:
        """An OrtValue that points into an array; both are kept."""
        from onnxruntime import OrtValue

        value = OrtValue.ortvalue_from_numpy(array)
        self._kept[name] = (array, value)
        return value
