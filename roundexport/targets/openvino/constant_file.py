"""Where constants' bytes lie while a graph is made: in an unnamed file beside the package, and not in memory.

OpenVINO writes a graph's weights when the whole graph is there.  Held in memory, they would take the package's size;
pages of a file that is mapped and shared can be written out and taken back by the system, and a limit on a process's
data (control group, ``ulimit -d``) does not count them.

    file       grows by segments of SEGMENT bytes, each reserved on the disk before it is mapped: a write to a page that
               the disk has no room for would end the process
    constant   64-byte aligned in a segment; small ones, and those made outside of `constants_in`, are OpenVINO's own

Costs: the package's size of disk until it is saved.  A constant does not keep its mapping alive; the context does.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from roundexport.storage.safetensors_writer import reserve

SEGMENT = 64 << 20
_SMALL = 1 << 16  # bytes below which a constant is not worth a place
_ALIGNED = 64


class _File:
    """The file and what is mapped of it."""

    def __init__(self, file: IO[bytes], folder: Path) -> None:
        self._file, self._folder, self._size = file, folder, 0
        self._mapped: list[mmap.mmap] = []
        self._used = 0  # bytes of the last segment

    def place(self, size: int) -> NDArray[np.uint8]:
        """So many bytes, zero."""
        if not self._mapped or self._used + size > len(self._mapped[-1]):
            self._grow(max(SEGMENT, size))
        found = np.frombuffer(self._mapped[-1], np.uint8, size, self._used)
        self._used += -(-size // _ALIGNED) * _ALIGNED
        return found

    def _grow(self, size: int) -> None:
        whole = -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        if self._mapped and hasattr(mmap, "MADV_DONTNEED"):
            self._mapped[-1].madvise(mmap.MADV_DONTNEED)  # the file keeps what was written
        reserve(self._file, self._size + whole, self._folder)
        self._mapped.append(mmap.mmap(self._file.fileno(), whole, offset=self._size))
        self._size, self._used = self._size + whole, 0


_FILE: ContextVar[_File | None] = ContextVar("constant file", default=None)


@contextmanager
def constants_in(folder: Path) -> Iterator[None]:
    """While it lasts, large constants lie in a file of this folder; none of them may be used afterwards.

    Raises:
        OSError: ENOSPC, the disk cannot hold them; which atomic.write_folder reports with what to do.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        token = _FILE.set(_File(file, folder))
        try:
            yield
        finally:
            _FILE.reset(token)


def new_tensor(kind: ov.Type, shape: tuple[int, ...]) -> tuple[ov.Tensor, NDArray[np.uint8]]:
    """A tensor to be filled, and its bytes."""
    size, file = -(-math.prod(shape) * kind.bitwidth // 8), _FILE.get()
    if file is None or size < _SMALL:
        tensor = ov.Tensor(kind, ov.Shape(list(shape)))
        return tensor, tensor.data.reshape(-1).view(np.uint8)
    place = file.place(size)
    return ov.Tensor(place, ov.Shape(list(shape)), kind), place
