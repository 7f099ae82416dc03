"""Hidden states that enter a block, from the float and the quantized prefix, in a memory-mapped file.

    <out>.partial/hidden-0000k.safetensors      quantized, floats   F32 [n, S, H]

The states are computed in the file from which an interrupted run resumes, so they are written once.  The file's space
is reserved before it is mapped: a full disk is then an error at once and not a bus error later.  Data begin on a page,
so tensors are aligned.

Mapped pages count as resident memory while they are in use.  :meth:`Hidden.drop` releases them; written data stay in
the system's cache on their way to the disk, and are mapped again without a copy at the next access.  It is called after
every batch, and by algorithms through ``BlockInputs.report``, which keeps the process small.
"""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path

import torch

from roundexport.errors import ArtifactError
from roundexport.storage.atomic import sync
from roundexport.storage.disk_errors import explained
from roundexport.storage.safetensors_reader import TensorFile, TensorSpec
from roundexport.storage.safetensors_writer import file_header, reserve

from .state_folder import again

NAMES = ("floats", "quantized")
_PAGE = 4096


class Hidden:
    """Hidden states in a mapped file; made by :meth:`create` or :meth:`open`.

    Attributes:
        path: the file.
        floats: what enters the block in the float model, float32 [n, S, H]; writing to it writes to the file.
        quantized: what enters it through blocks that are quantized.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], begin: int) -> None:
        self.path = path
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        count = math.prod(shape)
        self.floats, self.quantized = (
            torch.frombuffer(self._map, dtype=torch.float32, count=count, offset=begin + 4 * count * index).view(shape)
            for index in range(2)
        )

    @classmethod
    def create(cls, path: Path, shape: tuple[int, int, int], metadata: dict[str, str]) -> Hidden:
        """Begin a file of zeros; one that is in the way is replaced.

        Raises:
            WontFitError: the disk cannot hold it.
        """
        path.unlink(missing_ok=True)  # of a run that was killed before it recorded the file
        header = _header(shape, metadata)
        with explained(path):
            with open(path, "xb", buffering=0) as file:
                reserve(file, len(header) + 2 * 4 * math.prod(shape), path.parent)
                file.write(header)
        return cls(path, shape, len(header))

    @classmethod
    def open(cls, path: Path) -> Hidden:
        """Map a file that was made earlier.

        Raises:
            ArtifactError: it is missing or damaged.
        """
        file = TensorFile(path)
        shape = file.shape(NAMES[0])
        header = _header(shape, file.metadata)
        with open(path, "rb") as raw:
            if raw.read(len(header)) != header:
                raise ArtifactError(f"{path}: these are not hidden states; {again(path.parent)}")
        return cls(path, shape, len(header))

    def drop(self) -> None:
        """Give back the memory of pages that were read or written; their content stays.

        Does nothing where the system cannot be asked for that; it then takes the memory back when it needs it.
        """
        if hasattr(self._map, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def sync(self) -> None:
        """Make everything written so far survive a power cut."""
        with explained(self.path):
            if os.name != "posix":
                self._map.flush()
            sync(self.path)  # what was written through the map belongs to the file's cached pages


def drop(*states: Hidden) -> None:
    """:meth:`Hidden.drop` of several."""
    for hidden in states:
        hidden.drop()


def _header(shape: tuple[int, ...], metadata: dict[str, str]) -> bytes:
    """The file's header, with spaces up to the next page; the order of NAMES is that of the data."""
    tensors: dict[str, TensorSpec] = {name: ("F32", shape) for name in NAMES}
    text = file_header(tensors, metadata)[8:].rstrip(b" ")
    text += b" " * (-(8 + len(text)) % _PAGE)
    return len(text).to_bytes(8, "little") + text
