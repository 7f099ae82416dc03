"""safetensors files, written at any offset in any order, and read through mappings after full validation.

    8 bytes   n, length of the header, little endian
    n bytes   UTF-8 JSON {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets": [begin, end]}, …}, padded
              with spaces so that the data starts at a multiple of 8
    data      tensors one after another without gaps: larger item sizes first, then by name, so each is aligned

The writer lays the header down first, from shapes alone, and reserves the whole file; bytes never depend on the order
in which tensors arrive, so a run that was killed can reopen the file and go on.  The reader trusts nothing.
Source of the format: the safetensors README; files are interchangeable with that library
(tests/storage/test_safetensors_file.py).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import ArtifactError

from .atomic import full_disk_as_wont_fit
from .strict_json import parse

# dtype name -> (numpy dtype in which bytes are handed out, little endian).  BF16 has none in numpy: its bits as uint16.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"), "U8": np.dtype("u1"), "I8": np.dtype("i1"),
    "F8_E4M3": np.dtype("u1"), "F8_E5M2": np.dtype("u1"),
    "U16": np.dtype("<u2"), "I16": np.dtype("<i2"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "U32": np.dtype("<u4"), "I32": np.dtype("<i4"), "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"), "I64": np.dtype("<i8"), "F64": np.dtype("<f8"),
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_DIMENSIONS = 16
_CHUNK = 1 << 22  # items converted at a time: bounds the memory of read_float32 to its result plus 16 MiB

TensorSpec = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A safetensors file, read lazily; each tensor is mapped when asked for and unmapped when its array is dropped.

    Args:
        path: the file.

    Raises:
        ArtifactError: something in the file contradicts the format or its size: header length, JSON, duplicate or
            unknown keys, dtype, shape × dtype against byte range, ranges that overlap, leave gaps or leave the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                header, self._data = _read_header(file.read(8), file.read, size, path)
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
        self.metadata: dict[str, str] = _metadata(header.pop("__metadata__", {}), path)
        self._entries = {name: _entry(name, value, path) for name, value in header.items()}
        _check_ranges(self._entries, size - self._data, path)

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as the file calls it, such as ``BF16``."""
        return self._entry(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._entry(name).shape

    def read(self, name: str) -> NDArray[Any]:
        """Read-only mapped view of a tensor; BF16 as its uint16 bit pattern.

        Raises:
            ArtifactError: no such tensor.
        """
        entry = self._entry(name)
        if entry.begin == entry.end:
            return np.zeros(entry.shape, DTYPES[entry.dtype])
        mapped = np.memmap(self.path, DTYPES[entry.dtype], "r", self._data + entry.begin, entry.shape)
        return mapped.view(np.ndarray)

    def read_float32(
        self, name: str, rows: tuple[int, int] | None = None, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """A float tensor (F16, BF16, F32, F64) as a float32 array of its own; the file is read in pieces, never whole.

        Args:
            name: the tensor.
            rows: first and one past the last index along the first axis; None: all of it.
            out: float32 array of the result's shape, contiguous, to read into; None: a new one.

        Raises:
            ArtifactError: no such tensor, its dtype is not one of these, or ``rows`` are not all there.
        """
        entry = self._entry(name)
        if entry.dtype not in ("F16", "BF16", "F32", "F64"):
            raise ArtifactError(f"{self.path}: {name} is {entry.dtype}; F16, BF16, F32 or F64 expected")
        shape, begin, dtype = entry.shape, entry.begin, DTYPES[entry.dtype]
        if rows is not None:
            if not shape or not 0 <= rows[0] <= rows[1] <= shape[0]:
                raise ArtifactError(f"{self.path}: {name} {list(shape)} has no rows {rows[0]} to {rows[1]}")
            begin += rows[0] * math.prod(shape[1:]) * dtype.itemsize
            shape = (rows[1] - rows[0], *shape[1:])
        result = np.empty(shape, np.float32) if out is None else out
        if result.shape != shape or result.dtype != np.float32 or not result.flags.c_contiguous:
            raise ArtifactError(f"{self.path}: {name} is read as float32 {shape}, not {result.dtype} {result.shape}")
        values = result.reshape(-1)
        with open(self.path, "rb") as file:
            file.seek(self._data + begin)
            for start in range(0, values.size, _CHUNK):
                part = values[start : start + _CHUNK]
                raw = np.fromfile(file, dtype, part.size)
                if raw.size != part.size:
                    raise ArtifactError(f"{self.path} became shorter while it was read")
                if entry.dtype == "BF16":
                    raw = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
                part[:] = raw
        return result

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise ArtifactError(f"{self.path}: there is no tensor {name!r}")
        return self._entries[name]


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
        with full_disk_as_wont_fit(path):
            try:
                self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError as error:
                raise ArtifactError(f"{path} exists already") from error
            try:
                os.posix_fallocate(self._handle, 0, self.size)
                _write_at(self._handle, header, 0)
            except BaseException:
                os.close(self._handle)
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
            writer._handle = os.open(path, os.O_RDWR)
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be reopened: {error.strerror}; start again") from error
        found = os.pread(writer._handle, len(header), 0), os.fstat(writer._handle).st_size
        if found != (header, writer.size):
            os.close(writer._handle)
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
        with full_disk_as_wont_fit(self.path):
            _write_at(
                self._handle, np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, self._data + entry.begin
            )
        self.written.add(name)

    def sync(self) -> None:
        """Make everything written so far survive a power cut."""
        with full_disk_as_wont_fit(self.path):
            os.fsync(self._handle)

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
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1


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


def _layout(tensors: Mapping[str, TensorSpec]) -> dict[str, _Entry]:
    for name, (dtype, _) in tensors.items():
        if dtype not in DTYPES:
            raise ArtifactError(f"{name}: dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    entries, begin = {}, 0
    for name in sorted(tensors, key=lambda name: (-DTYPES[tensors[name][0]].itemsize, name)):
        dtype, shape = tensors[name]
        end = begin + math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = _Entry(dtype, tuple(shape), begin, end)
        begin = end
    return entries


def _write_at(handle: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(handle, view[: 1 << 30], offset)
        view, offset = view[count:], offset + count


def _read_header(prefix: bytes, read: Any, size: int, path: Path) -> tuple[dict[str, Any], int]:
    if len(prefix) < 8:
        raise ArtifactError(f"{path}: {size} bytes are too few for a safetensors file")
    length = int.from_bytes(prefix, "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise ArtifactError(
            f"{path}: the header should have {length} bytes but the file has {size}: truncated or no safetensors"
        )
    text = read(length)
    if not text.startswith(b"{"):
        raise ArtifactError(f"{path}: the header does not start with {{")
    return parse(text, f"{path}: header"), 8 + length


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ArtifactError(f"{path}: __metadata__ must map text to text")
    return value


def _entry(name: str, value: Any, path: Path) -> _Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ArtifactError(f"{path}: {name} needs exactly dtype, shape and data_offsets, found {value!r:.120}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ArtifactError(f"{path}: {name} has the unknown dtype {dtype!r:.40}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS or not _is_sizes(offsets) or len(offsets) != 2:
        raise ArtifactError(f"{path}: {name} has a malformed shape or data_offsets: {shape!r:.60}, {offsets!r:.60}")
    begin, end = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected:
        raise ArtifactError(f"{path}: {name} {dtype} {shape} takes {expected} bytes but its range has {end - begin}")
    return _Entry(dtype, tuple(shape), begin, end)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_ranges(entries: Mapping[str, _Entry], size: int, path: Path) -> None:
    """Ranges must tile the data exactly."""
    ordered = sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end))
    if ordered and ordered[-1][1].end > size:
        raise ArtifactError(
            f"{path}: {ordered[-1][0]} ends at byte {ordered[-1][1].end} of {size}: the file is truncated"
        )
    end = 0
    for name, entry in ordered:
        if entry.begin != end:
            what = "overlaps another tensor" if entry.begin < end else "leaves a gap before it"
            raise ArtifactError(f"{path}: {name} {what} (starts at byte {entry.begin}, expected {end})")
        end = entry.end
    if end != size:
        raise ArtifactError(f"{path}: {size - end} bytes at the end belong to no tensor")
