"""An OpenVINO graph in sections (runtime/sections.py): models made of the operators of one that is read once.

What crosses becomes a Result of one section and a Parameter of the next, put in the place of what it was.  Constants
and operators on them alone are shared by all sections; the file is mapped, so they take memory where they are compiled.
An operator that reads a state and the one that writes it stay in one section; a request of it is a stream's state.

The graph runs as it is in the file: attention with a state, not paged.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roundexport.environment.openvino_import import import_openvino
from roundexport.errors import ArtifactError
from roundexport.formats.package import PackageManifest
from roundexport.runtime.sections import Arrays, Stream, cut_places, with_axes
from roundexport.runtime.types import EngineOptions

from ._ov_graph import listed_files
from ._ov_properties import properties

if TYPE_CHECKING:
    import openvino as ov

_Key = tuple[str, int]  # an operator's name and the number of its output
_NOT_CUT = ("Parameter", "Constant", "Result", "Assign")


@dataclass(frozen=True)
class _Section:
    """A model, the name of every Parameter, and that of every Result."""

    model: ov.Model
    reads: list[str]
    gives: list[str]


def run(
    folder: Path, manifest: PackageManifest, options: EngineOptions, section_bytes: int, streams: Sequence[Stream]
) -> Iterator[list[Arrays]]:
    """See `run_in_sections`."""
    ov = import_openvino()
    core = ov.Core()
    path, weights = listed_files(folder, manifest)
    wanted = properties(core, "CPU", options)
    states: list[list[dict[str, Any]]] = [[dict(call) for call in stream.calls] for stream in streams]
    try:
        model = core.read_model(path, weights)
        outputs = [_first_name(output) for output in model.outputs]
        for section in _Graph(model).sections(section_bytes):
            compiled = core.compile_model(section.model, "CPU", wanted)
            for stream in states:
                _take(compiled, section, stream)
            del compiled
            gc.collect()
    except RuntimeError as error:
        raise ArtifactError(f"{path}: OpenVINO {ov.get_version()} refuses a section of the graph: {error}") from error
    for stream in states:
        yield [{name: call[name] for name in outputs} for call in stream]


def _take(compiled: ov.CompiledModel, section: _Section, calls: list[dict[str, Any]]) -> None:
    """Take the calls of a stream through a section; what crosses is put beside their inputs."""
    request = compiled.create_infer_request()
    ranks = {
        name: node.partial_shape.rank.get_length() for name, node in zip(section.reads, compiled.inputs, strict=True)
    }
    for call in calls:
        feeds = with_axes(call, ranks)
        request.infer({place: feeds[name] for place, name in enumerate(section.reads)})
        for place, name in enumerate(section.gives):
            call[name] = request.get_output_tensor(place).data.copy()


class _Graph:
    """A graph, its operators in order, and what of them is read where."""

    def __init__(self, model: ov.Model) -> None:
        ordered = model.get_ordered_ops()
        self._names = {_key(node.output(0)): _first_name(node.output(0)) for node in model.get_parameters()}
        self._moving = _moving(ordered)
        self._nodes = [node for node in ordered if _name(node) in self._moving and node.get_type_name() not in _NOT_CUT]
        self._place = {_name(node): place for place, node in enumerate(self._nodes)}
        self._writes = {node.get_variable_id(): node for node in ordered if node.get_type_name() == "Assign"}
        self._given = {_key(node.input_value(0)): _first_name(node.output(0)) for node in model.get_results()}
        self._last = _last_uses(self._nodes, self._place)
        self._crossed: dict[_Key, tuple[Any, Any]] = {}  # output -> its element type and shape

    def sections(self, most: int) -> Iterator[_Section]:
        """The graph, cut so that no section has more than ``most`` bytes of weights, if that can be."""
        ov = import_openvino()
        weights = [_weight(node, self._moving) for node in self._nodes]
        for begin, end in pairwise([0, *cut_places(weights, self._crossing(), most), len(self._nodes)]):
            nodes = self._nodes[begin:end]
            own = {_name(node) for node in nodes}
            reads = self._cut_off(nodes, own)
            results, gives = self._results(nodes, end)
            sinks = [node for node in self._writes.values() if _name(node.input_value(0).get_node()) in own]
            part = ov.Model(results, sinks, list(reads.values()), "section")
            yield _Section(part, [self._names[key] for key in reads], gives)

    def _crossing(self) -> list[int]:
        """Values that cross a cut before each operator; -1 between a state's reader and its writer."""
        found = [0] * (len(self._nodes) + 1)
        for (name, _), end in self._last.items():
            for between in range(self._place[name] + 1, end + 1):
                found[between] += 1
        for place, node in enumerate(self._nodes):
            if node.get_type_name() == "ReadValue":
                writer = self._writes[node.get_variable_id()].input_value(0).get_node()
                end = self._place[_name(writer)] + 1
                found[place + 1 : end] = [-1] * (end - place - 1)
        return found

    def _cut_off(self, nodes: Sequence[Any], own: set[str]) -> dict[_Key, Any]:
        """Parameters in the place of what a section reads from outside, which is in no section behind it then."""
        import openvino.opset15 as op

        reads: dict[_Key, Any] = {}
        for node in nodes:
            for entry in node.inputs():
                source = entry.get_source_output()
                key = _key(source)
                if key[0] in own or key[0] not in self._moving:
                    continue
                if key not in reads:
                    kind, shape = self._crossed.get(key) or (source.get_element_type(), source.get_partial_shape())
                    reads[key] = op.parameter(shape, kind)
                entry.replace_source_output(reads[key].output(0))
        return reads

    def _results(self, nodes: Sequence[Any], end: int) -> tuple[list[Any], list[str]]:
        """Results of a section, and their names."""
        import openvino.opset15 as op

        results, gives = [], []
        for output in (output for node in nodes for output in node.outputs()):
            key = _key(output)
            if key in self._given or self._last.get(key, -1) >= end:
                self._crossed[key] = (output.get_element_type(), output.get_partial_shape())
                self._names[key] = self._given.get(key, f"{key[0]}:{key[1]}")
                results.append(op.result(output))
                gives.append(self._names[key])
        return results, gives


def _moving(ordered: Sequence[Any]) -> set[str]:
    """Names of operators whose outputs depend on inputs or states."""
    found: set[str] = set()
    for node in ordered:
        kind = node.get_type_name()
        if kind in ("Parameter", "ReadValue") or any(_name(value.get_node()) in found for value in node.input_values()):
            found.add(_name(node))
    return found


def _last_uses(nodes: Sequence[Any], places: dict[str, int]) -> dict[_Key, int]:
    """Output -> place of the last operator that reads it."""
    last: dict[_Key, int] = {}
    for place, node in enumerate(nodes):
        for value in node.input_values():
            if _key(value)[0] in places:
                last[_key(value)] = place
    return last


def _weight(node: Any, moving: set[str]) -> int:
    """Bytes of the constants behind an operator."""
    size, open_ = 0, [value.get_node() for value in node.input_values()]
    seen: set[str] = set()
    while open_:
        one = open_.pop()
        if _name(one) in moving or _name(one) in seen:
            continue
        seen.add(_name(one))
        if one.get_type_name() == "Constant":
            size += one.get_byte_size()
        open_ += [value.get_node() for value in one.input_values()]
    return size


def _name(node: Any) -> str:
    """A name that no other operator has."""
    return str(node.get_name())


def _first_name(output: Any) -> str:
    return str(min(output.get_names()))


def _key(output: Any) -> _Key:
    return _name(output.get_node()), output.get_index()
