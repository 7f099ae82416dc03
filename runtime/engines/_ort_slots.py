"""The memory of an ONNX decoder's rows: a buffer per layer for keys and for values, with a slot for every row.

    buffer  [slots, Hkv, capacity, D]       slot k holds the first lengths[k] tokens of the row that lives in it

Buffers grow by reallocation, in slots and in capacity, up to ``max_context``.  They are zeroed memory that the system
hands out page by page when it is first written, so capacity costs nothing before it is used.  Copying a row and
bringing it elsewhere are copies of the tokens it has.  States of a fixed size live beside, in _ort_states.py.

Source: tests/runtime/test_sessions.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from roundexport.runtime.axis_positions import Places, begun
from roundexport.runtime.types import Floats
from roundexport.types import KvLayer

from ._ort_states import SlotStates

STEP = 256  # capacities are multiples of this


class Slots:
    """Buffers and how much of them is used.

    Args:
        kv: layers with a cache.
        states: shape of one row of every state, by name.
        max_context: most tokens of a row.

    Attributes:
        lengths: tokens in every slot.
        places: pictures in every slot, where positions have axes.
        capacity: tokens that a slot has room for.
        cache: keys and values by name, ``<layer>.key`` and ``<layer>.value``.
        states: what layers carry beside.
        version: another number whenever a buffer is another array; what was bound before is bound anew then.
    """

    def __init__(self, kv: Sequence[KvLayer], states: Mapping[str, tuple[int, ...]], max_context: int) -> None:
        self._kv, self._max_context = kv, max_context
        self.lengths: list[int] = []
        self.places: list[Places] = []
        self.capacity = 0
        self.cache: dict[str, Floats] = empty_cache(kv, 0, 0)
        self.states = SlotStates(states)
        self.version = 0

    def reserve(self, tokens: int) -> None:
        """Have room for so many tokens per row; grows by half at least, never beyond max_context."""
        if tokens > self.capacity:
            self.resize(len(self.lengths), max(tokens, self.capacity * 3 // 2))

    def resize(self, slots: int, capacity: int) -> None:
        """Buffers of so many slots and at least so many tokens, with what was in the old ones."""
        capacity = min(-(-capacity // STEP) * STEP, self._max_context)
        rows, used = len(self.lengths), max(self.lengths, default=0)
        for name, grown in empty_cache(self._kv, slots, capacity).items():
            grown[:rows, :, :used] = self.cache[name][:, :, :used]
            self.cache[name] = grown
        if slots > rows:
            self.states.resize(slots)
        self.capacity = capacity
        self.lengths += [0] * (slots - rows)
        self.places += [[] for _ in range(slots - rows)]
        self.version += 1

    def copy(self, source: int, target: int, length: int) -> None:
        """The first ``length`` tokens of one slot into another; states are not touched."""
        for array in self.cache.values():
            array[target, :, :length] = array[source, :, :length]
        self.lengths[target], self.places[target] = length, begun(self.places[source], length)

    def cut(self, slot: int, length: int) -> None:
        """Forget a slot's tokens beyond the first ``length``; states are not touched."""
        self.lengths[slot], self.places[slot] = length, begun(self.places[slot], length)

    def move(self, source: int, target: int) -> None:
        """What is in one slot into a free one."""
        self.copy(source, target, self.lengths[source])
        self.states.exchange(source, target)
        self.cut(source, 0)

    def exchange(self, one: int, other: int) -> None:
        """What is in two slots, each into the other's."""
        here, there = self.lengths[one], self.lengths[other]
        for array in self.cache.values():
            kept = array[other, :, :there].copy()
            array[other, :, :here] = array[one, :, :here]
            array[one, :, :there] = kept
        self.states.exchange(one, other)
        self.lengths[one], self.lengths[other] = there, here
        self.places[one], self.places[other] = self.places[other], self.places[one]

    def clear(self) -> None:
        """Free everything."""
        self.cache.clear()
        self.states.buffers.clear()
        self.version += 1


def empty_cache(kv: Sequence[KvLayer], slots: int, capacity: int) -> dict[str, Floats]:
    """Buffers [slots, Hkv, capacity, D] by name, ``<layer>.key`` and ``<layer>.value``, zeroed."""
    return {
        f"{layer['layer']}.{part}": np.zeros((slots, layer["num_kv_heads"], capacity, layer["head_dim"]), np.float32)
        for layer in kv
        for part in ("key", "value")
    }
