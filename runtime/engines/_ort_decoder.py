"""A decoder's rows on ONNX Runtime: every row lives in a slot of the KV buffers (_ort_slots.py), runs take slots.

    row ─▶ slot        slots 0 … n − 1 step together; a slot by itself takes several tokens

What GroupQueryAttention asks for, and how rows that come and go meet it:

- A run takes slots 0 … n − 1, because a part of a buffer is only without gaps along its first axis.  Rows that are to
  be stepped are brought there first, by exchange; that happens when a row comes or goes, and not in between.
- Several new tokens on a filled cache are possible for one row only.  They run on a view of that row's slot, chunk by
  chunk (`EngineOptions.prefill_chunk`: bounds logits [S, V] and attention scores [S, T]); nobody else takes part.
- Copying a row (a prefix that is continued twice) and cutting one back are a copy in memory and a number.
- States of a fixed size (short convolutions, linear attention) have buffers of their own (_ort_states.py), and know no
  padding: no run here has any.  They cannot be cut back; _states.py says from where a row can go on.

What a run reads and writes is bound in _ort_binding.py, or handed over in _ort_growing.py for the standard dialect.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention;
tests/runtime/test_sessions.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from roundexport.formats.package import PackageManifest
from roundexport.runtime.axis_positions import whole_positions
from roundexport.runtime.operator_times import OperatorTimes
from roundexport.runtime.types import DecoderSession, Floats, Ids

from ._ort_binding import Binding, SharedBinding
from ._ort_graph import Graph
from ._ort_growing import GrowingBinding
from ._ort_slots import Slots, empty_cache
from ._ort_states import state_shapes
from ._rows import Closing, check_new, unknown_row
from ._states import EVERY, Marks


class OrtDecoder:
    """A decoder graph."""

    def __init__(self, graph: Graph, manifest: PackageManifest) -> None:
        self.graph, self.token_rows = graph, graph.rows
        self.kv = manifest.kv
        self.max_context, self.prefill_chunk = manifest.max_context, graph.prefill_chunk
        self.vocab_size = manifest.vocab_size
        self.states = state_shapes((node.name, tuple(node.shape)) for node in graph.session.get_inputs())
        self._growing = manifest.settings.get("dialect") == "standard"

    def binding(self) -> Binding:
        """What runs the graph: on a buffer that is past and present, or on a cache that every step makes longer."""
        return GrowingBinding(self.graph) if self._growing else SharedBinding(self.graph, self.vocab_size)

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, time of opening."""
        return self.graph.info()

    def runs(self) -> int:
        """Runs since it was opened with a profile."""
        return self.graph.runs()

    def operator_times(self) -> list[OperatorTimes]:
        """What operators took in every run; see operator_times.py."""
        return self.graph.operator_times()

    def start(self, *, rows: int = 1, expected: int = 0) -> DecoderSession:
        """A session without rows; its cache has room for so many, of ``expected`` tokens each, at once."""
        return OrtSession(self, rows, expected)

    def logits(self, ids: Ids) -> Floats:
        """Logits [B, S, V] of whole sequences [B, S]: one run on an empty cache."""
        batch, length = ids.shape
        feeds: dict[str, Any] = {
            **self.graph.tokens(ids.astype(np.int64, copy=False)),
            "attention_mask": np.ones((batch, length), np.int64),
            "position_ids": whole_positions(self.graph.rows if self.graph.axes else None, ids),
        }
        for name, array in empty_cache(self.kv, batch).items():
            feeds[f"past_key_values.{name}"] = array
        for name, shape in self.states.items():
            feeds[f"past.{name}"] = np.zeros((batch, *shape), np.float32)
        feeds = {name: array for name, array in feeds.items() if name in self.graph.inputs}
        return self.graph.session.run(["logits"], feeds)[0]  # type: ignore[no-any-return]


class OrtSession(Closing):
    """Rows in the slots of one buffer per layer.

    Args:
        decoder: the graph.
        rows: slots to have from the start.
        expected: tokens per row to have room for from the start.
    """

    def __init__(self, decoder: OrtDecoder, rows: int, expected: int) -> None:
        self._slot_of: dict[int, int] = {}
        self._next = 0
        self._slots, self._marks = Slots(decoder.kv, decoder.states, decoder.max_context), Marks()
        self.cuts = not decoder.states
        self._most, self._vocab, self._chunk = decoder.max_context, decoder.vocab_size, decoder.prefill_chunk
        self._binding = decoder.binding()
        self._slots.resize(max(rows, 1), max(expected, 1))

    def add(self, count: int = 1) -> list[int]:
        """So many new rows without tokens."""
        return [self._new_row() for _ in range(count)]

    def length(self, row: int) -> int:
        """Tokens of a row."""
        return self._slots.lengths[self._slot(row)]

    def reach(self, row: int, length: int) -> int:
        """The longest beginning of a row, of at most ``length`` tokens, that `fork` and `cut` can give."""
        return length if self.cuts else self._marks.reach(row, self.length(row), length)

    def fork(self, row: int, length: int) -> int:
        """A new row with the first ``length`` tokens of another, by copying them.

        Raises:
            UnsupportedError: the row cannot go on from there, see `reach`.
        """
        states = self._states_at(row, length)
        made = self._new_row()
        self._slots.copy(self._slot(row), self._slot_of[made], length)
        self._slots.states.write(self._slot_of[made], states)
        self._marks.fork(row, made, length)
        return made

    def cut(self, row: int, length: int) -> None:
        """Forget a row's tokens beyond the first ``length``.

        Raises:
            UnsupportedError: the row cannot go on from there, see `reach`.
        """
        slot, states = self._slot(row), self._states_at(row, length)
        if length < self._slots.lengths[slot]:
            self._slots.states.write(slot, states)
            self._marks.cut(row, length)
        self._slots.cut(slot, length)

    def drop(self, row: int) -> None:
        """Forget a row; its slot is free."""
        slot = self._slot(row)
        del self._slot_of[row]
        self._marks.drop(row)
        self._slots.cut(slot, 0)

    def extend(self, new: Mapping[int, Sequence[int]]) -> Floats:
        """Append tokens to rows and give the logits [n, V] after the last one of each, in the order of ``new``.

        Raises:
            UsageError: a row gets no token, or would exceed ``max_context``.
        """
        check_new(new, self.length, self._most)
        single = [row for row, tokens in new.items() if len(tokens) == 1]
        if len(single) == len(new):
            return self._step(single, [tokens[0] for tokens in new.values()])
        found = np.empty((len(new), self._vocab), np.float32)
        for at, (row, tokens) in enumerate(new.items()):
            if len(tokens) > 1:
                found[at] = self._append(row, tokens, every=False)[-1]
        if single:
            places = [at for at, tokens in enumerate(new.values()) if len(tokens) == 1]
            found[places] = self._step(single, [new[row][0] for row in single])
        return found

    def scores(self, row: int, tokens: Sequence[int]) -> Floats:
        """Append tokens to one row and give the logits [S, V] after every one of them.

        Raises:
            UsageError: no token, or the row would exceed ``max_context``.
        """
        check_new({row: tokens}, self.length, self._most)
        return self._append(row, tokens, every=True)

    def close(self) -> None:
        """Free the cache."""
        self._binding.clear()
        self._slots.clear()
        self._slot_of.clear()

    def _step(self, rows: Sequence[int], tokens: Sequence[int]) -> Floats:
        """Append one token to each row, all in one run on the first slots."""
        slots = self._brought_forward(rows)
        if slots == list(range(len(rows))):
            return self._binding.step(self._slots, tokens)
        token_in = dict(zip(slots, tokens, strict=True))
        return self._binding.step(self._slots, [token_in[slot] for slot in range(len(rows))])[slots]

    def _append(self, row: int, tokens: Sequence[int], every: bool) -> Floats:
        """Append tokens to one row on a view of its slot: logits [S or 1, V]."""
        slot, past = self._slot(row), self.length(row)
        self._slots.reserve(past + len(tokens))
        found = []
        for start, end in self._pieces(past, len(tokens)):
            found.append(self._binding.append(self._slots, slot, tokens[start:end], every))
            if self._slots.states and (past + end) % EVERY == 0:
                self._marks.note(row, past + end, self._slots.states.read(slot))
        return np.concatenate(found) if every and len(found) > 1 else found[-1]

    def _pieces(self, past: int, count: int) -> Iterator[tuple[int, int]]:
        """Where ``count`` tokens behind ``past`` others are cut; with states at every length that gets a mark."""
        start, size = 0, EVERY if self._slots.states else self._chunk
        while start < count:
            end = min(count, start + size - ((past + start) % size if self._slots.states else 0))
            yield start, end
            start = end

    def _states_at(self, row: int, length: int) -> Mapping[str, Floats] | None:
        """What a row's states were when it had ``length`` tokens; None: zeros, or there are none.

        Raises:
            UnsupportedError: nobody knows.
        """
        slot = self._slot(row)
        has, states = self._slots.lengths[slot], self._slots.states
        assert 0 <= length <= has, "a row is cut and copied within its length"
        if not states:
            return None
        return states.read(slot) if length == has else self._marks.at(row, length)

    def _slot(self, row: int) -> int:
        try:
            return self._slot_of[row]
        except KeyError:
            raise unknown_row(row) from None

    def _new_row(self) -> int:
        taken, slots = set(self._slot_of.values()), self._slots
        slot = next((slot for slot in range(len(slots.lengths)) if slot not in taken), None)
        if slot is None:
            slot = len(slots.lengths)
            slots.resize(max(slot + 1, slot * 3 // 2), slots.capacity)
        row, self._next = self._next, self._next + 1
        self._slot_of[row] = slot
        slots.states.write(slot, None)
        return row

    def _brought_forward(self, rows: Sequence[int]) -> list[int]:
        """The slots of rows, after exchanging what is needed for them to be the first ones."""
        count = len(rows)
        slots = [self._slot(row) for row in rows]
        if max(slots) >= count:
            row_in = {slot: row for row, slot in self._slot_of.items()}
            free = iter(sorted(set(range(count)) - set(slots)))
            for at, slot in enumerate(slots):
                if slot >= count:
                    slots[at] = target = next(free)
                    self._bring(rows[at], slot, target, row_in.get(target))
        return slots

    def _bring(self, row: int, slot: int, target: int, other: int | None) -> None:
        """Bring a row from its slot to another, and the row that is there, if any, back."""
        self._slot_of[row] = target
        if other is None:
            self._slots.move(slot, target)
        else:
            self._slots.exchange(slot, target)
            self._slot_of[other] = slot
