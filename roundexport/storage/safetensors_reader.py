"""safetensors files, read through mappings after full validation; the reader trusts nothing.

    8 bytes   n, length of the header, little endian
    n bytes   UTF-8 JSON {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets": [begin, end]}, …}
    data      tensors one after another without gaps

Source of the format: the safetensors README; files are interchangeable with that library
(tests/storage/test_safetensors.py).  safetensors_writer.py writes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import ArtifactError

from .strict_json import parse

# dtype name -> (numpy dtype in which bytes are handed out, little endian).  BF16 has none in numpy: its bits as uint16.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"), "U8": np.dtype("u1"), "I8": np.dtype("i1"),
    "F8_E4M3": np.dtype("u1"), "F8_E5M2": np.dtype("u1"), "F8_E8M0": np.dtype("u1"),
    "U16": np.dtype("<u2"), "I16": np.dtype("<i2"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "U32": np.dtype("<u4"), "I32": np.dtype("<i4"), "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"), "I64": np.dtype("<i8"), "F64": np.dtype("<f8"),
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_DIMENSIONS = 16
MAX_HEADER_VALUES = 1_500_000  # 200,000 tensors in one file; the largest models have 100,000 in hundreds of files
_CHUNK = 1 << 22  # items converted at a time: bounds the memory of read_float32 to its result plus 16 MiB

TensorSpec = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a header: its range is in bytes from the beginning of the data."""

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

    def read(self, name: str, private: bool = False) -> NDArray[Any]:
        """Mapped view of a tensor; BF16 as its uint16 bit pattern.

        Args:
            name: the tensor.
            private: it may be written to, which stays in this process; else it is read-only.

        Raises:
            ArtifactError: no such tensor.
        """
        entry = self._entry(name)
        if entry.begin == entry.end:
            return np.zeros(entry.shape, DTYPES[entry.dtype])
        mapped = np.memmap(
            self.path, DTYPES[entry.dtype], "c" if private else "r", self._data + entry.begin, entry.shape
        )
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

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise ArtifactError(f"{self.path}: there is no tensor {name!r}")
        return self._entries[name]


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
    return parse(text, f"{path}: header", MAX_HEADER_VALUES), 8 + length


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ArtifactError(f"{path}: __metadata__ must map text to text")
    return value


def _entry(name: str, value: Any, path: Path) -> TensorEntry:
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
    if math.prod(size for size in shape if size) * DTYPES[dtype].itemsize >= 1 << 63:  # empty, and yet too large
        raise ArtifactError(f"{path}: {name} has the impossible shape {shape!r:.80}")
    return TensorEntry(dtype, tuple(shape), begin, end)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_ranges(entries: Mapping[str, TensorEntry], size: int, path: Path) -> None:
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
