"""The header of a GGUF file, read without any other package: what the model is and which tensors there are.

    "GGUF" │ version u32 │ tensors u64 │ pairs u64 │ key, type, value … │ name, dimensions, type, offset … │ data

Everything is little-endian; a string is its length (u64) and its bytes.  Dimensions come fastest first, so a matrix
[N, K] is stored as (K, N).  Arrays of strings (vocabulary, merges) are passed over: only their length is kept.

A hostile header costs nothing: every length is held against the end of the file before it is followed.
Source: docs/gguf.md of ggml-org/ggml, versions 2 and 3.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roundexport.errors import CheckpointError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: name, shape with the fastest dimension last, type number of ggml, offset in the data."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself.

    Args:
        path: the file.
        metadata: value by key; of an array of strings, its length.
        tensors: the tensors.
        data: where in the file their data begin.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    data: int

    @property
    def architecture(self) -> str:
        """``general.architecture``, as in ``llama``."""
        return str(self.metadata.get("general.architecture", ""))


def is_gguf(model: str | Path) -> bool:
    """Whether ``model`` is a GGUF file, by its ending or by its first bytes."""
    path = Path(model)
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    with open(path, "rb") as file:
        return file.read(4) == MAGIC


def read_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises:
        CheckpointError: it cannot be read, is not a GGUF file, is of another version, or ends inside its header.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(24)
            if start[:4] != MAGIC:
                raise CheckpointError(f"{path} is not a GGUF file: it begins with {start[:4]!r}, not with {MAGIC!r}")
            if len(start) < 24:
                raise _truncated(path)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _Reader(path, mapped).header()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _truncated(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: the file ends inside its header; it is incomplete, fetch it again")


class _Reader:
    """A position in the mapped file, moved by what is read."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path, self.mapped, self.at = path, mapped, 4

    def header(self) -> GgufHeader:
        version = self.number("I")
        if version not in _VERSIONS:
            raise CheckpointError(
                f"{self.path}: GGUF version {version} (little-endian) is not read; versions 2 and 3 are"
            )
        tensors, pairs = self.number("Q"), self.number("Q")
        metadata = {}
        for _ in range(pairs):
            key = self.text()
            metadata[key] = self.value(self.number("I"))
        found = tuple(self.tensor() for _ in range(tensors))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(f"{self.path}: general.alignment is {alignment!r}; a power of two is expected")
        return GgufHeader(self.path, metadata, found, -(-self.at // alignment) * alignment)

    def take(self, count: int) -> bytes:
        if count > len(self.mapped) - self.at:
            raise _truncated(self.path)
        self.at += count
        return self.mapped[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: its header holds a name or value that is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise CheckpointError(f"{self.path}: its header holds a value of the unknown type {kind}")
        element, count = self.number("I"), self.number("Q")
        if element in _SCALARS:
            code = _SCALARS[element]
            return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code))))
        if element != _STRING:
            raise CheckpointError(f"{self.path}: its header holds an array of the unknown type {element}")
        for _ in range(count):
            self.take(self.number("Q"))
        return count

    def tensor(self) -> GgufTensor:
        name, dimensions = self.text(), self.number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise CheckpointError(
                f"{self.path}: {name} has {dimensions} dimensions; at most {_MAX_DIMENSIONS} are read"
            )
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        return GgufTensor(name, shape, self.number("I"), self.number("Q"))
