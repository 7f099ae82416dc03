"""An ONNX graph in sections (runtime/sections.py): graphs of their own that read the same data file.

Nodes whose inputs are all constants go with whoever reads them, twice where two sections do.  Outputs that cross are
declared without a type: the session of the section that gives them knows it, and tells the next.  Sections are made by
the onnx library, which exporting needs and running packages does not.

A session without an arena gives memory back when it is closed, and takes no more than it needs for weights.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from roundexport.formats.package import PackageManifest
from roundexport.runtime.sections import Arrays, Stream, cut_places, with_axes
from roundexport.runtime.types import EngineOptions

from ._ort_graph import listed_graph, open_bytes

if TYPE_CHECKING:
    import onnx

_CACHES = ("past_key_values.", "past.")
_PRESENT = "present."


@dataclass(frozen=True)
class _Section:
    """Nodes, and the names of what they read from outside and give to the outside."""

    nodes: list[Any]
    reads: list[str]
    gives: list[str]


def run(
    folder: Path, manifest: PackageManifest, options: EngineOptions, section_bytes: int, streams: Sequence[Stream]
) -> Iterator[list[Arrays]]:
    """See `run_in_sections`."""
    import onnx

    path = listed_graph(folder, manifest)
    graph = _Graph(onnx.load(path, load_external_data=False))
    states: list[list[dict[str, Any]]] = [[dict(call) for call in stream.calls] for stream in streams]
    for section in graph.sections(section_bytes):
        session = open_bytes(graph.bytes_of(section), path, options, lean=True)
        graph.learn(session)
        for stream in states:
            _take(session, section, stream)
        del session
        gc.collect()
    for stream in states:
        yield [{name: call[name] for name in graph.outputs if name in call} for call in stream]


def _take(session: Any, section: _Section, calls: list[dict[str, Any]]) -> None:
    """Take the calls of a stream through a section; what crosses is put beside their inputs."""
    nodes = session.get_inputs()
    past = {node.name: node.shape for node in nodes if node.name.startswith(_CACHES)}
    ranks = {node.name: len(node.shape) for node in nodes if node.name not in past}
    presents = [name for name in section.gives if name.startswith(_PRESENT)]
    rest = [name for name in section.gives if not name.startswith(_PRESENT)]
    caches: dict[str, Any] | None = None
    for call in calls:
        rows = len(next(iter(call.values())))
        caches = {name: _empty(shape, rows) for name, shape in past.items()} if caches is None else caches
        found = session.run([*rest, *presents], {**with_axes(call, ranks), **caches})
        call.update(zip(rest, found, strict=False))
        now = dict(zip(presents, found[len(rest) :], strict=True))
        caches = {name: now[_PRESENT + name.partition(".")[2]] for name in past}


def _empty(shape: Sequence[Any], rows: int) -> Any:
    """A cache [B, H, 0, D], or a state [B, …] of zeros."""
    return np.zeros([rows, *(size if isinstance(size, int) else 0 for size in shape[1:])], np.float32)


class _Graph:
    """A graph, what its nodes read, and what is known of types."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model, graph = model, model.graph
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._inputs = {value.name: value for value in graph.input if value.name not in self._constants}
        self._types: dict[str, Any] = dict(self._inputs)
        self.outputs = [value.name for value in graph.output if not value.name.startswith(_PRESENT)]
        self._wanted = {value.name for value in graph.output}
        moving = set(self._inputs)
        self._maker: dict[str, Any] = {}  # value -> the node of constants that makes it
        self._nodes = []
        for node in graph.node:
            if any(name in moving for name in _reads(node)):
                self._nodes.append(node)
                moving.update(filter(None, node.output))
            else:
                self._maker.update(dict.fromkeys(filter(None, node.output), node))

    def sections(self, most: int) -> list[_Section]:
        """The graph, cut so that no section has more than ``most`` bytes of weights, if that can be."""
        last: dict[str, int] = {}
        for place, node in enumerate(self._nodes):
            last.update(dict.fromkeys((name for name in _reads(node) if name not in self._inputs), place))
        made = {name: place for place, node in enumerate(self._nodes) for name in node.output if name}
        crossing = [0] * (len(self._nodes) + 1)
        for name, place in made.items():
            for between in range(place + 1, last.get(name, place) + 1):
                crossing[between] += 1
        weights = [sum(_size(self._constants[name]) for name in self._weights(node)) for node in self._nodes]
        cuts = [0, *cut_places(weights, crossing, most), len(self._nodes)]
        found = []
        for begin, end in pairwise(cuts):
            nodes = self._nodes[begin:end]
            own = {name for node in nodes for name in node.output if name}
            read = dict.fromkeys(name for node in nodes for name in _reads(node))
            reads = [name for name in read if name not in own and (name in made or name in self._inputs)]
            gives = [name for name in own if name in self._wanted or last.get(name, -1) >= end]
            found.append(_Section([*self._behind(nodes), *nodes], reads, sorted(gives)))
        return found

    def bytes_of(self, section: _Section) -> bytes:
        """A section as a model of its own; types of what it reads are known by then."""
        import onnx

        part = onnx.ModelProto()
        part.CopyFrom(onnx.ModelProto(ir_version=self._model.ir_version, opset_import=self._model.opset_import))
        part.functions.extend(self._model.functions)
        part.graph.name = "section"
        part.graph.node.extend(section.nodes)
        names = dict.fromkeys(name for node in section.nodes for name in _reads(node))
        part.graph.initializer.extend(self._constants[name] for name in names if name in self._constants)
        part.graph.input.extend(self._types[name] for name in section.reads)
        part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in section.gives)
        return part.SerializeToString()  # type: ignore[no-any-return]

    def learn(self, session: Any) -> None:
        """Types of what a section gives, for those that read it."""
        import onnx

        for node in session.get_outputs():
            kind = node.type.removeprefix("tensor(").removesuffix(")")
            number = onnx.TensorProto.DataType.Value({"double": "DOUBLE"}.get(kind, kind.upper()))
            self._types[node.name] = onnx.helper.make_tensor_value_info(node.name, number, [None] * len(node.shape))

    def _weights(self, node: Any) -> set[str]:
        """Constants that a node reads, itself or through nodes of constants."""
        names = [name for one in (*self._behind([node]), node) for name in _reads(one)]
        return {name for name in names if name in self._constants}

    def _behind(self, nodes: Sequence[Any]) -> list[Any]:
        """Nodes of constants that nodes read, in an order in which they can run."""
        found: dict[int, Any] = {}

        def visit(node: Any) -> None:
            for name in _reads(node):
                maker = self._maker.get(name)
                if maker is not None and id(maker) not in found:
                    visit(maker)
                    found[id(maker)] = maker

        for node in nodes:
            visit(node)
        return list(found.values())


def _reads(node: Any) -> Iterator[str]:
    """Names that a node reads, and graphs within it."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for graph in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
            own = {name for inner in graph.node for name in inner.output} | {one.name for one in graph.initializer}
            own |= {one.name for one in graph.input}
            yield from (name for inner in graph.node for name in _reads(inner) if name not in own)
            yield from (one.name for one in graph.output if one.name not in own)


def _size(tensor: Any) -> int:
    stored = {entry.key: entry.value for entry in tensor.external_data}
    return int(stored.get("length", tensor.ByteSize()))
