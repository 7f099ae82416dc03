"""States of a fixed size of an ONNX decoder: a buffer for each, with a slot for every row, bound as past and present.

    past.<layer>.<kind> [B, …]  ──▶  present.<layer>.<kind>        one memory, as both kernels read before they write

Source: com.microsoft CausalConvWithState and LinearAttention, https://github.com/microsoft/onnxruntime/blob/main/docs/
ContribOperators.md; tests/runtime/test_state_sessions.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from roundexport.runtime.types import Floats

STATE = re.compile(r"past\.(\d+\.\w+)")
"""Name of a state's input, and in it the name of the state."""


def state_shapes(inputs: Iterable[tuple[str, tuple[object, ...]]]) -> dict[str, tuple[int, ...]]:
    """The shape of one row of every state among named inputs [B, …]."""
    found = ((STATE.fullmatch(name), shape) for name, shape in inputs)
    return {match[1]: tuple(int(str(size)) for size in shape[1:]) for match, shape in found if match}


class SlotStates:
    """Buffers [slots, …], zeroed.

    Args:
        shapes: of one row, by name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.buffers: dict[str, Floats] = {name: np.zeros((0, *shape), np.float32) for name, shape in shapes.items()}

    def __bool__(self) -> bool:
        return bool(self.buffers)

    def resize(self, slots: int) -> None:
        """Have so many slots, and what was in those there were."""
        for name, old in self.buffers.items():
            grown = np.zeros((slots, *old.shape[1:]), np.float32)
            grown[: len(old)] = old
            self.buffers[name] = grown

    def read(self, slot: int) -> dict[str, Floats]:
        """Copies of the states in a slot."""
        return {name: buffer[slot].copy() for name, buffer in self.buffers.items()}

    def write(self, slot: int, values: Mapping[str, Floats] | None) -> None:
        """Put states into a slot; None: of a row without tokens."""
        for name, buffer in self.buffers.items():
            buffer[slot] = 0 if values is None else values[name]

    def exchange(self, one: int, other: int) -> None:
        """Exchange the states in two slots."""
        for buffer in self.buffers.values():
            buffer[[one, other]] = buffer[[other, one]]
