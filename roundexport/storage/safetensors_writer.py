"""safetensors files, written at any offset in any order; safetensors_reader.py tells the format.

The header is laid down first, from shapes alone, and the whole file reserved; bytes never depend on the order in which
tensors arrive, so a run that was killed can reopen the file and go on.  Larger item sizes come first, then names, so
each tensor is aligned; the header is padded with spaces so that the data starts at a multiple of 8.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import ArtifactError

from .disk_errors import explained
from .safetensors_reader import DTYPES, TensorEntry, TensorSpec

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # file systems and C libraries without fallocate


class TensorFileWriter:
    """Writes a safetensors file whose shapes are known beforehand, tensor by tensor in any order.

    Which tensors are there is the caller's knowledge: a file that was reopened says nothing about it by itself.

    Args:
        path: the file; it must not exist (see :meth:`open_existing`).
        tensors: name -> (dtype, shape).
        metadata: text stored in the header.

    Raises:
        ArtifactError: the file exists, or a dtype is unknown.
        WontFitError: the disk cannot hold the file, found before anything is computed.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        self._start(path, tensors, metadata)
        header = file_header(tensors, metadata)
        with explained(path):
            try:
                self._file: IO[bytes] | None = open(path, "x+b", buffering=0)
            except FileExistsError as error:
                raise ArtifactError(f"{path} exists already") from error
            try:
                reserve(self._file, self.size, path.parent)
                _write_at(self._file, header, 0)
            except BaseException:
                self.abandon()
                path.unlink()
                raise

    @classmethod
    def open_existing(
        cls, path: Path, tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str], written: Iterable[str] = ()
    ) -> TensorFileWriter:
        """Go on with a file begun earlier by the same arguments.

        Args:
            path: the file.
            tensors: as it was begun with.
            metadata: as it was begun with.
            written: names that are known to be complete.

        Raises:
            ArtifactError: the file is missing, or was begun with other tensors.
        """
        writer = cls.__new__(cls)
        writer._start(path, tensors, metadata)
        header = file_header(tensors, metadata)
        try:
            writer._file = open(path, "r+b", buffering=0)
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be reopened: {error.strerror}; start again") from error
        found = writer._file.read(len(header)), path.stat().st_size
        if found != (header, writer.size):
            writer.abandon()
            raise ArtifactError(f"{path} was begun with other tensors or is damaged; remove it and start again")
        writer.written = {name for name in written if name in writer._entries}
        return writer

    def _start(self, path: Path, tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        self.path = path
        self.written: set[str] = set()
        self._entries = _layout(tensors)
        self._data = len(file_header(tensors, metadata))
        self.size = self._data + max((entry.end for entry in self._entries.values()), default=0)

    def write(self, name: str, values: NDArray[Any]) -> None:
        """Write one tensor; BF16 is given as its uint16 bit pattern.

        Raises:
            ArtifactError: no such tensor, or another dtype or shape than announced.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise ArtifactError(f"{self.path}: {name!r} was not announced")
        if values.shape != entry.shape or values.dtype != DTYPES[entry.dtype]:
            found = f"{values.dtype} {values.shape}"
            raise ArtifactError(f"{self.path}: {name} was announced as {entry.dtype} {entry.shape}, given {found}")
        with explained(self.path):
            data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
            _write_at(self._opened(), data, self._data + entry.begin)
        self.written.add(name)

    def sync(self) -> None:
        """Make everything written so far survive a power cut."""
        with explained(self.path):
            os.fsync(self._opened().fileno())

    def close(self) -> None:
        """Finish the file.

        Raises:
            ArtifactError: a tensor is missing; the file stays open.
        """
        missing = sorted(self._entries.keys() - self.written)
        if missing:
            raise ArtifactError(f"{self.path}: {len(missing)} tensors were not written, the first is {missing[0]}")
        self.sync()
        self.abandon()

    def abandon(self) -> None:
        """Close the file as it is, to be reopened or removed."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _opened(self) -> IO[bytes]:
        assert self._file is not None, "the file was closed"
        return self._file


def reserve(file: IO[bytes], size: int, folder: Path) -> None:
    """Give a file its full size, so that a full disk is found before anything is computed.

    Where the system cannot reserve space, the free space is looked at instead; others may take it meanwhile.

    Args:
        file: opened for writing; it may have no name.
        size: bytes.
        folder: where it lies.

    Raises:
        OSError: ENOSPC, the disk cannot hold it.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    if shutil.disk_usage(folder).free < size - os.fstat(file.fileno()).st_size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    file.truncate(size)


def write_tensors(path: Path, tensors: Mapping[str, tuple[str, NDArray[Any]]], metadata: Mapping[str, str]) -> None:
    """Write a whole file from name -> (dtype, values)."""
    writer = TensorFileWriter(
        path, {name: (dtype, values.shape) for name, (dtype, values) in tensors.items()}, metadata
    )
    for name, (_, values) in tensors.items():
        writer.write(name, values)
    writer.close()


def file_header(tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data: length and JSON."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, entry in _layout(tensors).items():
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.begin, entry.end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _layout(tensors: Mapping[str, TensorSpec]) -> dict[str, TensorEntry]:
    for name, (dtype, _) in tensors.items():
        if dtype not in DTYPES:
            raise ArtifactError(f"{name}: dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    entries, begin = {}, 0
    for name in sorted(tensors, key=lambda name: (-DTYPES[tensors[name][0]].itemsize, name)):
        dtype, shape = tensors[name]
        end = begin + math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = TensorEntry(dtype, tuple(shape), begin, end)
        begin = end
    return entries


def _write_at(file: IO[bytes], data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    file.seek(offset)
    while view:
        view = view[file.write(view[: 1 << 30]) :]
