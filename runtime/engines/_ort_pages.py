"""Zeroed memory that the system hands out a page at a time when it is first written, and takes back when it is told.

    zeroed(shape)              costs nothing yet
    write [slot, :, :length]   costs the pages of what was written
    give_back(slot, length)    they cost nothing again; what is read there is no matter

numpy's own large arrays are no such memory: it asks Linux for huge pages, of which a single number costs 2 MiB, and
nothing gives back a part of one.  Pages of 4 KiB are as fast here: the figure is in decisions/0060.

Limits: where the system has no private mappings with MADV_DONTNEED (Windows, macOS) these are numpy's arrays, and
nothing is given back before the whole is; nor is it on a Linux that takes no advice.

Source: https://man7.org/linux/man-pages/man2/madvise.2.html; https://github.com/numpy/numpy/pull/14216.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from roundexport.runtime.types import Floats

_LINUX = sys.platform == "linux"


class Pages:
    """A buffer [slots, heads, capacity, D], zeroed.

    Args:
        shape: of the buffer.

    Attributes:
        array: the buffer; may be used for longer than this object.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        size = 4 * math.prod(shape)
        self._memory: mmap.mmap | None = None
        if _LINUX and size:
            self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a kernel without huge pages knows no such advice, and needs none
                self._memory.madvise(mmap.MADV_NOHUGEPAGE)
            self.array: Floats = np.frombuffer(self._memory, np.float32).reshape(shape)
        else:
            self.array = np.zeros(shape, np.float32)

    def give_back(self, slot: int, length: int) -> None:
        """Forget what stands in a slot behind its first ``length`` tokens, as far as that fills pages."""
        _, heads, capacity, width = self.array.shape
        if length == 0:
            self._drop(slot * heads * capacity * width, (slot + 1) * heads * capacity * width)
            return
        for head in range(slot * heads, (slot + 1) * heads):
            self._drop((head * capacity + length) * width, (head + 1) * capacity * width)

    def give_all_back(self) -> None:
        """Forget everything, also where somebody still holds the array."""
        self._drop(0, self.array.size)

    def _drop(self, begin: int, end: int) -> None:
        """Forget the pages that lie wholly between two numbers of the buffer."""
        page = mmap.PAGESIZE
        first, last = -(-4 * begin // page) * page, 4 * end // page * page
        if self._memory is not None and last > first:
            with suppress(OSError):  # they stay, as on other systems: nobody counts on reading zeros
                self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)
