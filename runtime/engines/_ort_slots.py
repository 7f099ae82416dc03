"""The memory of an ONNX decoder's rows: a buffer per layer for keys and for values, with a slot for every row.

    buffer  [slots, Hkv, capacity, D]       slot k holds the first lengths[k] tokens of the row that lives in it

Buffers grow by reallocation, in slots and in capacity, up to ``max_context``.  A slot costs the tokens in it, not its
capacity (_ort_pages.py): nothing is written behind a row's last token, and what a row leaves behind where it is
dropped, cut or brought elsewhere is given back.  Copying a row and bringing it elsewhere are copies of the tokens it
has.  States of a fixed size live beside, in _ort_states.py.

Source: tests/runtime/test_slots.py, tests/runtime/test_sessions.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from roundexport.runtime.axis_positions import Places, begun
from roundexport.runtime.types import Floats
from roundexport.types import KvLayer

from ._ort_pages import Pages
from ._ort_states import SlotStates

STEP = 256  # capacities are multiples of this
_WORTH = 64  # tokens from which a row's end is given back; a drafter cuts a few in every run


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
        self._pages = {name: Pages(shape) for name, shape in cache_shapes(kv, 0, 0).items()}
        self.cache: dict[str, Floats] = {name: pages.array for name, pages in self._pages.items()}
        self.states = SlotStates(states)
        self.version = 0

    def reserve(self, tokens: int) -> None:
        """Have room for so many tokens per row; grows by half at least, never beyond max_context."""
        if tokens > self.capacity:
            self.resize(len(self.lengths), max(tokens, self.capacity * 3 // 2))

    def resize(self, slots: int, capacity: int) -> None:
        """Buffers of so many slots and at least so many tokens, with what was in the old ones."""
        capacity = min(-(-capacity // STEP) * STEP, self._max_context)
        rows = len(self.lengths)
        for name, shape in cache_shapes(self._kv, slots, capacity).items():
            grown, old = Pages(shape), self._pages[name]
            for slot, length in enumerate(self.lengths):
                grown.array[slot, :, :length] = old.array[slot, :, :length]
            old.give_all_back()  # it stays bound until the next run
            self._pages[name], self.cache[name] = grown, grown.array
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
        before = self.lengths[slot]
        self.lengths[slot], self.places[slot] = length, begun(self.places[slot], length)
        self._give_back(slot, before)

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
        self._give_back(one, here)
        self._give_back(other, there)

    def clear(self) -> None:
        """Free everything."""
        self.cache.clear()
        self._pages.clear()
        self.states.buffers.clear()
        self.version += 1

    def _give_back(self, slot: int, before: int) -> None:
        """What a slot had behind the tokens that it has now."""
        length = self.lengths[slot]
        if before - length >= _WORTH or length == 0 < before:
            for pages in self._pages.values():
                pages.give_back(slot, length)


def cache_shapes(kv: Sequence[KvLayer], slots: int, capacity: int) -> dict[str, tuple[int, int, int, int]]:
    """Shapes [slots, Hkv, capacity, D] by name, ``<layer>.key`` and ``<layer>.value``."""
    return {
        f"{layer['layer']}.{part}": (slots, layer["num_kv_heads"], capacity, layer["head_dim"])
        for layer in kv
        for part in ("key", "value")
    }


def empty_cache(kv: Sequence[KvLayer], slots: int) -> dict[str, Floats]:
    """A cache of rows without tokens, [slots, Hkv, 0, D] by name."""
    return {name: np.zeros(shape, np.float32) for name, shape in cache_shapes(kv, slots, 0).items()}
