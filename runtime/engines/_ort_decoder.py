"""A decoder's rows on ONNX Runtime: one KV buffer per layer, bound as past and present, with a slot for every row.

    buffer  [slots, Hkv, capacity, D]       row ─▶ slot        past and present are the same memory

What GroupQueryAttention asks for, and how rows that come and go meet it:

- The kernel writes new keys and values behind a row's last valid one, in place; it takes each row's length from the
  sum of its mask.  So rows of one run may have any lengths, and a decode step copies nothing.
- A run takes slots 0 … n − 1, because a part of a buffer is only without gaps along its first axis.  Rows that are to
  be stepped are brought there first, by exchange; that happens when a row comes or goes, and not in between.
- Several new tokens on a filled cache are possible for one row only.  They run on a view of that row's slot, chunk by
  chunk; nobody else takes part.
- Copying a row (a prefix that is continued twice) and cutting one back are a copy in memory and a number.
- States of a fixed size (short convolutions, linear attention) have buffers of their own (_ort_states.py), and know no
  padding: no run here has any.  They cannot be cut back; _states.py says from where a row can go on.

Buffers grow by reallocation, in slots and in capacity, up to ``max_context``.  They are zeroed memory that the system
hands out page by page when it is first written, so capacity costs nothing before it is used.

Logits of a long prompt cost a product with the whole vocabulary per token.  A graph may have an initializer
``logits_start`` (int64 [1], 0), overridden with −1 where only the last position's are wanted.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention;
tests/runtime/test_sessions.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from roundexport.formats.package import PackageManifest
from roundexport.runtime.types import DecoderSession, Floats, Ids
from roundexport.types import KvLayer

from ._ort_graph import Graph
from ._ort_growing import GrowingBinding
from ._ort_states import SlotStates, state_shapes
from ._rows import Closing, check_new, unknown_row
from ._states import EVERY, Marks

_STEP = 256  # capacities are multiples of this
_CHUNK = 512  # tokens of one row per run: bounds logits [S, V] and attention scores [S, T]


class OrtDecoder:
    """A decoder graph."""

    def __init__(self, graph: Graph, manifest: PackageManifest) -> None:
        self.graph = graph
        self.kv = manifest.kv
        self.max_context = manifest.max_context
        self.vocab_size = manifest.vocab_size
        self.states = state_shapes((node.name, tuple(node.shape)) for node in graph.session.get_inputs())
        self._growing = manifest.settings.get("dialect") == "standard"

    def binding(self) -> _Binding | GrowingBinding:
        """What binds a run's arrays: a buffer that is past and present, or a cache that every step makes longer."""
        return GrowingBinding(self.graph, self.vocab_size) if self._growing else _Binding(self)

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, time of opening."""
        return self.graph.info()

    def start(self, *, rows: int = 1, expected: int = 0) -> DecoderSession:
        """A session without rows; its cache has room for so many, of ``expected`` tokens each, at once."""
        return OrtSession(self, rows, expected)

    def logits(self, ids: Ids) -> Floats:
        """Logits [B, S, V] of whole sequences [B, S]: one run on an empty cache."""
        batch, length = ids.shape
        feeds: dict[str, Any] = {
            **self.graph.tokens(ids.astype(np.int64, copy=False)),
            "attention_mask": np.ones((batch, length), np.int64),
            "position_ids": np.tile(np.arange(length, dtype=np.int64), (batch, 1)),
        }
        for name, array in empty_cache(self.kv, batch, 0).items():
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
        self._decoder = decoder
        self._slot_of: dict[int, int] = {}
        self._next = 0
        self._lengths = np.zeros(0, np.int64)  # by slot
        self._capacity = 0
        self._cache: dict[str, Floats] = empty_cache(decoder.kv, 0, 0)
        self._states, self._marks = SlotStates(decoder.states), Marks()
        self.cuts = not decoder.states
        self._batch, self._single = decoder.binding(), decoder.binding()
        self._ones = np.ones(0, np.int64)
        self._resize(max(rows, 1), max(expected, 1))

    def add(self, count: int = 1) -> list[int]:
        """So many new rows without tokens."""
        return [self._new_row() for _ in range(count)]

    def length(self, row: int) -> int:
        """Tokens of a row."""
        return int(self._lengths[self._slot(row)])

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
        source, target = self._slot(row), self._slot_of[made]
        for array in self._cache.values():
            array[target, :, :length] = array[source, :, :length]
        self._states.write(target, states)
        self._marks.fork(row, made, length)
        self._lengths[target] = length
        return made

    def cut(self, row: int, length: int) -> None:
        """Forget a row's tokens beyond the first ``length``.

        Raises:
            UnsupportedError: the row cannot go on from there, see `reach`.
        """
        slot, states = self._slot(row), self._states_at(row, length)
        if length < self._lengths[slot]:
            self._states.write(slot, states)
            self._marks.cut(row, length)
        self._lengths[slot] = length

    def drop(self, row: int) -> None:
        """Forget a row; its slot is free."""
        slot = self._slot(row)
        del self._slot_of[row]
        self._marks.drop(row)
        self._lengths[slot] = 0

    def extend(self, new: Mapping[int, Sequence[int]]) -> Floats:
        """Append tokens to rows and give the logits [n, V] after the last one of each, in the order of ``new``.

        Raises:
            UsageError: a row gets no token, or would exceed ``max_context``.
        """
        check_new({row: (self.length(row), len(tokens)) for row, tokens in new.items()}, self._decoder.max_context)
        single = [row for row, tokens in new.items() if len(tokens) == 1]
        if len(single) == len(new):
            return self._step(single, [new[row][0] for row in single])
        found = np.empty((len(new), self._decoder.vocab_size), np.float32)
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
        check_new({row: (self.length(row), len(tokens))}, self._decoder.max_context)
        return self._append(row, tokens, every=True)

    def close(self) -> None:
        """Free the cache."""
        self._batch.clear()
        self._single.clear()
        self._cache.clear()
        self._states.buffers.clear()
        self._slot_of.clear()

    def _step(self, rows: Sequence[int], tokens: Sequence[int]) -> Floats:
        """Append one token to each row, all in one run on the first slots."""
        count = len(rows)
        slots = self._brought_forward(rows)
        self._reserve(int(self._lengths[:count].max()) + 1)
        self._lengths[:count] += 1
        lengths = self._lengths[:count]
        ids = self._batch.step_ids(count)
        ids[slots, 0] = tokens
        total = int(lengths.max())
        if count == 1:
            mask = self._ones[:total].reshape(1, total)
        else:
            mask = (np.arange(total) < lengths[:, None]).astype(np.int64)
        self._batch.caches(self._cache, self._states.buffers, 0, count)
        logits = self._batch.step_logits(count)
        self._batch.run(ids, mask, lengths[:, None] - 1, logits, -1)
        return logits[:, 0] if slots == list(range(count)) else logits[slots, 0]

    def _append(self, row: int, tokens: Sequence[int], every: bool) -> Floats:
        """Append tokens to one row on a view of its slot: logits [S or 1, V]."""
        slot = self._slot(row)
        self._reserve(int(self._lengths[slot]) + len(tokens))
        self._single.caches(self._cache, self._states.buffers, slot, slot + 1)
        found = []
        for start, end in self._pieces(int(self._lengths[slot]), len(tokens)):
            chunk = np.array([tokens[start:end]], np.int64)
            past, width = int(self._lengths[slot]), chunk.shape[1]
            self._lengths[slot] = total = past + width
            last_only = self._decoder.graph.has_logits_start and not every
            logits = np.empty((1, 1 if last_only else width, self._decoder.vocab_size), np.float32)
            mask = self._ones[:total].reshape(1, total)
            self._single.run(chunk, mask, np.arange(past, total)[None], logits, -1 if last_only else 0)
            found.append(logits[0] if every else logits[0, -1:])
            if self._states and total % EVERY == 0:
                self._marks.note(row, total, self._states.read(slot))
        return np.concatenate(found) if every and len(found) > 1 else found[-1]

    def _pieces(self, past: int, count: int) -> Iterator[tuple[int, int]]:
        """Where ``count`` tokens behind ``past`` others are cut; with states at every length that gets a mark."""
        start, size = 0, EVERY if self._states else _CHUNK
        while start < count:
            end = min(count, start + size - ((past + start) % size if self._states else 0))
            yield start, end
            start = end

    def _states_at(self, row: int, length: int) -> Mapping[str, Floats] | None:
        """What a row's states were when it had ``length`` tokens; None: zeros, or there are none.

        Raises:
            UnsupportedError: nobody knows.
        """
        slot = self._slot(row)
        assert 0 <= length <= self._lengths[slot], "a row is cut and copied within its length"
        if not self._states:
            return None
        return self._states.read(slot) if length == self._lengths[slot] else self._marks.at(row, length)

    def _slot(self, row: int) -> int:
        try:
            return self._slot_of[row]
        except KeyError:
            raise unknown_row(row) from None

    def _new_row(self) -> int:
        taken = set(self._slot_of.values())
        slot = next((slot for slot in range(len(self._lengths)) if slot not in taken), None)
        if slot is None:
            slot = len(self._lengths)
            self._resize(max(slot + 1, slot * 3 // 2), self._capacity)
        row, self._next = self._next, self._next + 1
        self._slot_of[row] = slot
        self._states.write(slot, None)
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
                    self._exchange(row_in.get(target), target, rows[at], slot)
        return slots

    def _exchange(self, other: int | None, target: int, row: int, slot: int) -> None:
        """Bring a row from its slot to another, and the row that is there, if any, back."""
        here, there = int(self._lengths[slot]), int(self._lengths[target])
        for array in self._cache.values():
            kept = array[target, :, :there].copy() if other is not None else None
            array[target, :, :here] = array[slot, :, :here]
            if kept is not None:
                array[slot, :, :there] = kept
        self._states.exchange(slot, target)
        self._lengths[[slot, target]] = there, here
        self._slot_of[row] = target
        if other is not None:
            self._slot_of[other] = slot

    def _reserve(self, tokens: int) -> None:
        """Have room for so many tokens per row; grows by half at least, never beyond max_context."""
        if tokens > self._capacity:
            self._resize(len(self._lengths), max(tokens, self._capacity * 3 // 2))

    def _resize(self, slots: int, capacity: int) -> None:
        """Buffers of so many slots and at least so many tokens, with what was in the old ones."""
        capacity = min(-(-capacity // _STEP) * _STEP, self._decoder.max_context)
        used, rows = int(self._lengths.max(initial=0)), len(self._lengths)
        for name, grown in empty_cache(self._decoder.kv, slots, capacity).items():
            grown[:rows, :, :used] = self._cache[name][:, :, :used]
            self._cache[name] = grown
        if slots > rows:
            self._states.resize(slots)
        self._capacity = capacity
        self._lengths = np.concatenate([self._lengths, np.zeros(slots - rows, np.int64)])
        self._ones = np.ones(capacity, np.int64)


class _Binding:
    """What one run reads and writes; arrays stay bound from run to run while they are the same."""

    def __init__(self, decoder: OrtDecoder) -> None:
        session = decoder.graph.session
        self._io = session.io_binding()
        self._run = session.run_with_iobinding
        self._tokens = decoder.graph.tokens
        self._names = decoder.graph.inputs | ({"logits_start"} if decoder.graph.has_logits_start else set())
        self._vocab = decoder.vocab_size
        self._kept: dict[str, tuple[Any, Any]] = {}  # arrays and values that point into them: alive while bound
        self._part: tuple[Any, ...] = ()
        self._ids = np.zeros((0, 1), np.int64)
        self._logits = np.zeros((0, 1, 0), np.float32)
        self._start = {at: np.array([at], np.int64) for at in (-1, 0)}

    def step_ids(self, count: int) -> Ids:
        """int64 [n, 1], the same memory every time."""
        if len(self._ids) != count:
            self._ids = np.zeros((count, 1), np.int64)
        return self._ids

    def step_logits(self, count: int) -> Floats:
        """float32 [n, 1, V], the same memory every time."""
        if len(self._logits) != count:
            self._logits = np.empty((count, 1, self._vocab), np.float32)
        return self._logits

    def caches(self, cache: Mapping[str, Floats], states: Mapping[str, Floats], begin: int, end: int) -> None:
        """Bind slots ``begin`` to ``end`` of every buffer as past and present."""
        firsts = (next(iter(buffers.values()), None) for buffers in (cache, states))
        part = (*map(id, firsts), begin, end)
        if part == self._part:
            return
        for past, buffers in (("past_key_values", cache), ("past", states)):
            for name, array in buffers.items():
                view = array[begin:end]
                value = _value(view)
                self._kept[name] = (view, value)
                self._io.bind_ortvalue_input(f"{past}.{name}", value)
                self._io.bind_ortvalue_output(f"present.{name}", value)
        self._part = part

    def run(self, ids: Ids, mask: Ids, positions: Ids, logits: Floats, start: int) -> None:
        """One run; ``logits`` [n, S or 1, V] is written."""
        inputs = {
            **self._tokens(ids),
            "attention_mask": mask,
            "position_ids": np.ascontiguousarray(positions),
            "logits_start": self._start[start],
        }
        for name, array in inputs.items():
            if name in self._names and self._newly_kept(name, array):
                self._io.bind_ortvalue_input(name, self._kept[name][1])
        if self._newly_kept("logits", logits):
            self._io.bind_ortvalue_output("logits", self._kept["logits"][1])
        self._run(self._io)

    def clear(self) -> None:
        """Let go of everything bound."""
        self._io.clear_binding_inputs()
        self._io.clear_binding_outputs()
        self._kept.clear()
        self._part = ()

    def _newly_kept(self, name: str, array: Any) -> bool:
        """Keep an array and a value that points into it; False if that very array is bound already."""
        if name in self._kept and self._kept[name][0] is array:
            return False
        self._kept[name] = (array, _value(array))
        return True


def _value(array: Any) -> Any:
    """An OrtValue that points into an array."""
    from onnxruntime import OrtValue

    return OrtValue.ortvalue_from_numpy(array)


def empty_cache(kv: Sequence[KvLayer], slots: int, capacity: int) -> dict[str, Floats]:
    """Buffers [slots, Hkv, capacity, D] by name, ``<layer>.key`` and ``<layer>.value``, zeroed."""
    return {
        f"{layer['layer']}.{part}": np.zeros((slots, layer["num_kv_heads"], capacity, layer["head_dim"]), np.float32)
        for layer in kv
        for part in ("key", "value")
    }
