"""The few facts of a model.onnx that ONNX Runtime does not tell: rows of rotary tables, files it reads, domains.

The file is a protocol buffer: (key, value) pairs with ``key = field << 3 | kind``; kind 0 is a number of seven bits per
byte, kind 2 a length and that many bytes, 1 and 5 are eight and four bytes.  Only the path to the wanted fields is
walked, everything else is jumped over, so weights inside the file are not touched and the onnx library is not needed.

    ModelProto  7 graph, 8 opset_import of (1 domain)
    GraphProto  1 node, 5 initializer      NodeProto  1 input, 4 op_type
                                           AttributeProto  5 t, 6 g, 10 tensors, 11 graphs is NodeProto 5
    TensorProto 1 dims, 8 name, 13 external_data of (1 key, 2 value)

Source: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto; input 7 of com.microsoft.GroupQueryAttention is
``cos_cache``.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

from roundexport.errors import ArtifactError

_COS_CACHE = 7
Bytes = memoryview


def rotary_rows(path: Path) -> int | None:
    """Rows of the shortest rotary table that an attention node reads; None where there is none."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        with memoryview(mapped) as data:
            return _rows(data)


def domains(path: Path) -> set[str]:
    """Domains of the operators that a graph takes from.

    Raises:
        ArtifactError: this is not an ONNX file.
    """
    return _read(path, lambda data: {bytes(name).decode() for opset in fields(data, 8) for name in fields(opset, 1)})


def external_files(path: Path) -> set[str]:
    """Names of the files beside a graph that its tensors are in.

    Raises:
        ArtifactError: this is not an ONNX file.
    """
    return _read(path, lambda data: {name for graph in fields(data, 7) for name in _locations(graph)})


def _read(path: Path, walk: Callable[[Bytes], set[str]]) -> set[str]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            with memoryview(mapped) as data:
                return walk(data)
    except (ValueError, IndexError, RecursionError, BufferError) as error:
        raise ArtifactError(f"{path}: this is not an ONNX file, or is damaged") from error


def _locations(graph: Bytes) -> Iterator[str]:
    tensors = list(fields(graph, 5))
    for node in fields(graph, 1):
        for attribute in fields(node, 5):
            tensors += [tensor for field in (5, 10) for tensor in fields(attribute, field)]
            for field in (6, 11):
                for inner in fields(attribute, field):
                    yield from _locations(inner)
    for tensor in tensors:
        for entry in fields(tensor, 13):
            key, value = (b"".join(bytes(part) for part in fields(entry, field)) for field in (1, 2))
            if key == b"location":
                yield value.decode()


def _rows(data: Bytes) -> int | None:
    tables: set[bytes] = set()
    rows: dict[bytes, int] = {}
    for graph in fields(data, 7):
        for node in fields(graph, 1):
            if b"".join(bytes(kind) for kind in fields(node, 4)) == b"GroupQueryAttention":
                inputs = [bytes(name) for name in fields(node, 1)]
                tables.update(inputs[_COS_CACHE : _COS_CACHE + 1])
        for tensor in fields(graph, 5):
            name = b"".join(bytes(part) for part in fields(tensor, 8))
            if name in tables:
                rows[name] = _first_size(tensor)
    return min(rows.values(), default=None)


def _first_size(tensor: Bytes) -> int:
    """The first of a tensor's dims, which are stored one by one or together."""
    for field, value in _pairs(tensor):
        if field == 1:
            return value if isinstance(value, int) else _number(value, 0)[0]
    return 0


def fields(data: Bytes, wanted: int) -> Iterator[Bytes]:
    """Values of one field that holds bytes."""
    for field, value in _pairs(data):
        if field == wanted and isinstance(value, memoryview):
            yield value


def _pairs(data: Bytes) -> Iterator[tuple[int, int | Bytes]]:
    at = 0
    while at < len(data):
        key, at = _number(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _number(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            length, at = _number(data, at)
        else:
            length = 8 if kind == 1 else 4
        yield key >> 3, data[at : at + length]
        at += length


def _number(data: Bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
