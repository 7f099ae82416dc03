"""A package's files, a compiled OpenVINO model, its infer requests, and where its logits come from."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roundexport.environment.openvino_import import import_openvino
from roundexport.errors import UsageError
from roundexport.formats.package import PackageManifest
from roundexport.runtime.operator_times import OperatorTimes
from roundexport.runtime.token_rows import TokenRows
from roundexport.runtime.types import EngineOptions, Ids
from roundexport.storage.paths import ListedFiles
from roundexport.types import EMBEDS

from ._claims import GraphShapes, key_caches, size
from ._ov_properties import PRECISIONS, plain

if TYPE_CHECKING:
    import openvino as ov

LIBRARY = "openvino"
_FIXED = re.compile(r"past\.\d+\.\w+present\.")
# What may stand between the last MatMul and the logits without mixing positions (soft caps, scales, a cast).
_ELEMENTWISE = {"Add", "Subtract", "Multiply", "Divide", "Tanh", "Convert"}


def listed_files(folder: Path, manifest: PackageManifest, name: str | None = None) -> tuple[Path, Path]:
    """A package's graph, or another by its name, and the file beside it that holds its weights."""
    files, name = ListedFiles(folder, manifest.files), name or manifest.model_file
    return files.path(name), files.path(f"{name.removesuffix('.xml')}.bin")


def graph_shapes(model: ov.Model, output: str) -> GraphShapes:
    """What a graph says of its caches and of the width of an output."""
    states = (variable.get_info() for variable in model.get_variables())
    keys = key_caches((state.variable_id, _dimensions(state.data_shape)) for state in states)
    shape = next((_dimensions(node.partial_shape) for node in model.outputs if output in node.get_names()), ())
    return GraphShapes(keys, size(shape[-1]) if shape else None)


def fixed_states(model: ov.Model) -> frozenset[str]:
    """Names of states that do not grow with the text: of short convolutions and of linear attention."""
    names = (variable.get_info().variable_id for variable in model.get_variables())
    return frozenset(name for name in names if _FIXED.match(name))


def has_axes(model: ov.Model) -> bool:
    """Whether a decoder's positions have several axes."""
    ranks = [node.partial_shape.rank for node in model.inputs if "position_ids" in node.get_names()]
    return any(rank.is_static and rank.get_length() > 2 for rank in ranks)


def row_width(model: ov.Model) -> int | None:
    """Width of the rows that a decoder's graph reads, where these are vectors."""
    shapes = [_dimensions(node.partial_shape) for node in model.inputs if EMBEDS in node.get_names()]
    return size(shapes[0][-1]) if shapes and shapes[0] else None


def _dimensions(shape: ov.PartialShape) -> tuple[int | None, ...]:
    if shape.rank.is_dynamic:
        return ()
    return tuple(part.get_length() if part.is_static else None for part in shape)


def last_matmul(model: ov.Model) -> ov.Node | None:
    """The product with the output layer, or None if what stands before the logits is not recognized."""
    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() in _ELEMENTWISE:
        node = node.input_value(0).get_node()
    if node.get_type_name() != "MatMul" or node.input_value(0).get_partial_shape().rank.get_length() != 3:
        return None
    return node


class Graph:
    """A compiled model and what it was compiled with.

    Attributes:
        rows: makes what a graph with `inputs_embeds` reads; set by whoever opened the table of tokens.
        axes: whether positions have several axes, see axis_positions.py; likewise.
        prefill_chunk: tokens of a prompt per run.
    """

    def __init__(
        self, compiled: ov.CompiledModel, device: str, options: EngineOptions, times: dict[str, float]
    ) -> None:
        self.compiled = compiled
        self.inputs = frozenset(name for node in compiled.inputs for name in node.get_names())
        self.axes = False
        self.rows: TokenRows | None = None
        self.prefill_chunk = options.prefill_chunk
        self._recorded: list[OperatorTimes] | None = [] if options.profile else None
        self._told: dict[str, float] = {}  # by node: what all runs so far took, in ms
        self._device = device
        self._options = options
        self._times = times

    def tokens(self, ids: Ids) -> dict[str, Any]:
        """The input that a decoder's graph reads for token ids, [B, S] or [T]."""
        if self.rows is None:
            return {"input_ids": ids}
        return {EMBEDS: self.rows(ids) if ids.ndim > 1 else self.rows(ids[None])[0]}

    def record(self, request: ov.InferRequest, began: float) -> None:
        """Keep what operators took in a request's last run, begun at this `time.perf_counter`, where that is wanted."""
        if self._recorded is None:
            return
        total_ms, times = (time.perf_counter() - began) * 1e3, defaultdict[str, float](float)
        runs = len(self._recorded) + 1
        for node in request.get_profiling_info():
            if node.status == type(node).Status.EXECUTED:
                # The plugin tells the mean over all runs, in whole microseconds; sums over several runs are exact to
                # as many microseconds a node as there were runs before, so one run's own may even be below zero.
                told = node.real_time.total_seconds() * 1e3 * runs
                times[node.node_type] += told - self._told.get(node.node_name, 0.0)
                self._told[node.node_name] = told
        self._recorded.append(OperatorTimes(total_ms, dict(times)))

    def runs(self) -> int:
        """Runs that were recorded; 0 without a profile."""
        return len(self._recorded or ())

    def operator_times(self) -> list[OperatorTimes]:
        """What operators took in every run; recording ends.

        Raises:
            UsageError: the graph was compiled without a profile.
        """
        found, self._recorded = self._recorded, None
        if found is None:
            raise UsageError("times of operators are recorded where a package is opened with profile")
        return found

    def info(self) -> dict[str, Any]:
        known = set(self.compiled.get_property("SUPPORTED_PROPERTIES"))
        threads = "INFERENCE_NUM_THREADS"
        return {
            "engine": "ov",
            "library": LIBRARY,
            "version": import_openvino().get_version(),
            "device": self._device,
            "threads": self.compiled.get_property(threads) if threads in known else self._options.threads,
            "precise": self._options.precise,
            "precision": {
                label: plain(self.compiled.get_property(name)) for label, name in PRECISIONS.items() if name in known
            },
            **self._times,
        }


class Requests:
    """Infer requests that are not in use.  A request has one set of tensors, so two threads never share one."""

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self._compiled = compiled
        self._idle: list[ov.InferRequest] = []

    def acquire(self) -> ov.InferRequest:
        try:
            return self._idle.pop()  # one operation, so that no other thread takes the same
        except IndexError:
            return self._compiled.create_infer_request()

    def release(self, request: ov.InferRequest) -> None:
        self._idle.append(request)
