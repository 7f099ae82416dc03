"""Accuracy levels of the products in a serialized ONNX graph: what they are, and a graph with others.

A MatMulNBits node rounds activations to int8 if its ``accuracy_level`` is 4, a GroupMatMul node (kernels/native/) too.
No session option undoes that (``mlas.qnbit.force_fp32`` does for 4 bits at block size 32 only, measured), so the
attribute is changed in the graph's bytes before they are handed over; at 0 the difference to the exact product goes
from 1e-2 to 1e-6.  An attribute is stored as field 1 (its name, here of 14 bytes) and field 3 (its value, here one
byte), so a byte is exchanged in place and no length changes; the onnx library is not needed.

    NodeProto  3 name, 9 metadata_props of (1 key, 2 value)
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

from roundexport.formats.package import LAYERS_KEY
from roundexport.runtime.types import Product

from ._onnx_file import fields

_LEVEL = b"\x0a\x0eaccuracy_level\x18"
_INT8, _FLOAT32 = b"\x04", b"\x00"


def products(graph: bytes) -> tuple[Product, ...]:
    """Products of quantized layers, in the order of the graph; one of a block that is run twice is there once."""
    found: dict[str, Product] = {}
    for node in _nodes(memoryview(graph)):
        layers = _layers(node)
        if layers and _LEVEL in bytes(node):
            name = _name(node)
            own = (
                layers if len(layers) > 1 else (name.rpartition("/")[0] or layers[0],)
            )  # of a shared weight its reader
            found[name] = Product(name, own, _LEVEL + _INT8 in bytes(node))
    return tuple(found.values())


def with_int8_activations(graph: bytes, names: Collection[str] = ()) -> bytes:
    """The graph with 8-bit activations in the products of these names, and float32 ones in all others."""
    changed = bytearray(graph.replace(_LEVEL + _INT8, _LEVEL + _FLOAT32))
    if names:
        for node in _nodes(memoryview(changed)):
            at = bytes(node).find(_LEVEL) if _name(node) in names else -1
            if at >= 0:
                node[at + len(_LEVEL) : at + len(_LEVEL) + 1] = _INT8
    return bytes(changed)


def _nodes(model: memoryview) -> Iterator[memoryview]:
    for graph in fields(model, 7):
        yield from fields(graph, 1)


def _name(node: memoryview) -> str:
    return b"".join(bytes(name) for name in fields(node, 3)).decode()


def _layers(node: memoryview) -> tuple[str, ...]:
    """Layers that a node's metadata names."""
    for entry in fields(node, 9):
        key, value = (b"".join(bytes(part) for part in fields(entry, field)) for field in (1, 2))
        if key == LAYERS_KEY.encode():
            return tuple(str(row[0]) for row in json.loads(value))
    return ()
