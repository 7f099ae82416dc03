"""An ONNX Runtime session, what it was opened with, and what its graph says.

A precise session reads a graph whose accuracy levels were changed (_ort_levels.py); where the session itself makes
MatMulNBits of DequantizeLinear and MatMul (graphs of the standard dialect), an option of its says the level.  A graph
with roundexport's own operator (GroupMatMul: kernels/native/) gets the built library.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from roundexport.errors import ArtifactError, UnsupportedError, UsageError
from roundexport.formats.package import PackageManifest
from roundexport.kernels.native.library import DOMAIN, built, instruction_set
from roundexport.runtime.operator_times import OperatorTimes
from roundexport.runtime.token_rows import TokenRows
from roundexport.runtime.types import EngineOptions, Ids
from roundexport.storage.paths import ListedFiles
from roundexport.types import EMBEDS

from ._claims import GraphShapes, key_caches, size
from ._onnx_file import domains, external_files, rotary_rows
from ._ort_levels import with_int8_activations
from ._ort_profile import CountingSession, read_profile

LIBRARY = "onnxruntime"
PRECISE = {"session.qdq_matmulnbits_accuracy_level": "0"}
"""What a session is told to be precise, beside the change of its graph."""


def listed_graph(folder: Path, manifest: PackageManifest, name: str | None = None) -> Path:
    """A package's graph, or another by its name; the files that it reads are among those that the manifest lists.

    Raises:
        ArtifactError: one of them is not.
    """
    files = ListedFiles(folder, manifest.files)
    path = files.path(name or manifest.model_file)
    for file in external_files(path):
        files.path(file)
    return path


def read_shapes(path: Path, output: str) -> GraphShapes:
    """What a graph says of itself, without making it ready to run."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = 1
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.add_session_config_entry("session.disable_prepacking", "1")
    return _shapes(_session(str(path), settings, path), path, output)


def _session(model: str | bytes, settings: Any, path: Path) -> Any:
    import onnxruntime as ort

    if DOMAIN in domains(path):
        settings.register_custom_ops_library(str(built()))
    try:
        return ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class
        raise ArtifactError(f"{path}: ONNX Runtime {ort.__version__} refuses the graph: {error}") from error


def refuse_properties(options: EngineOptions) -> None:
    """Say that properties have no effect here: a session takes any entry, and never tells which it has not understood.

    Raises:
        UnsupportedError: some were given.
    """
    if options.properties:
        raise UnsupportedError(
            f"properties ({', '.join(options.properties)}) are OpenVINO's; how exact an ONNX package is stands in its "
            "graph: export --accuracy-level, and precise makes it float32"
        )


def _settings(options: EngineOptions, record: str | None = None) -> Any:
    import onnxruntime as ort

    refuse_properties(options)
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    if record is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(record) / "runs")
    return settings


def open_bytes(model: bytes, path: Path, options: EngineOptions, lean: bool = False, record: str | None = None) -> Any:
    """A session of a serialized graph.

    Args:
        model: the graph.
        path: where it is from; the files that it reads are beside that.
        options: if precise, products read float32 activations, but those that it excepts.
        lean: take no memory in advance.
        record: folder for a profile; None: none is made.

    Raises:
        ArtifactError: ONNX Runtime refuses the graph.
    """
    settings = _settings(options, record)
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    if options.precise:
        model = with_int8_activations(model, options.int8_products)
        for name, value in PRECISE.items():
            settings.add_session_config_entry(name, value)
    if lean:
        settings.enable_cpu_mem_arena = settings.enable_mem_pattern = False
        settings.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    return _session(model, settings, path)


def _shapes(session: Any, path: Path, output: str) -> GraphShapes:
    keys = key_caches((node.name, tuple(node.shape)) for node in session.get_inputs())
    shape: list[Any] = next((node.shape for node in session.get_outputs() if node.name == output), [])
    return GraphShapes(keys, size(shape[-1]) if shape else None, rotary_rows(path))


class Graph:
    """An inference session and what it was opened with.

    Attributes:
        rows: makes what a graph with `inputs_embeds` reads; set by whoever opened the table of tokens.
        axes: whether positions have several axes, see axis_positions.py.
        row_width: of what it reads, where that is vectors.
        prefill_chunk: tokens of a prompt per run.
    """

    def __init__(self, path: Path, options: EngineOptions) -> None:
        import onnxruntime as ort

        began = time.perf_counter()
        self._record = tempfile.TemporaryDirectory(prefix="roundexport-") if options.profile else None
        record = None if self._record is None else self._record.name
        if options.precise:
            self.session = open_bytes(path.read_bytes(), path, options, record=record)
        else:
            self.session = _session(str(path), _settings(options, record), path)
        if record is not None:
            self.session = CountingSession(self.session)
        self.rows: TokenRows | None = None
        shapes = {node.name: tuple(node.shape) for node in self.session.get_inputs()}
        self.inputs = frozenset(shapes)
        self.axes = len(shapes.get("position_ids", ())) > 2
        self.row_width = size(shapes[EMBEDS][-1]) if EMBEDS in shapes else None
        self.has_logits_start = "logits_start" in {n.name for n in self.session.get_overridable_initializers()}
        self.prefill_chunk = options.prefill_chunk
        self._path = path
        self._options = options
        self._version = ort.__version__
        self._kernels = instruction_set() if DOMAIN in domains(path) else None
        self._compile_ms = (time.perf_counter() - began) * 1e3

    def tokens(self, ids: Ids) -> dict[str, Any]:
        """The input that a decoder's graph reads for token ids."""
        return {"input_ids": ids} if self.rows is None else {EMBEDS: self.rows(ids)}

    def shapes(self, output: str) -> GraphShapes:
        """What the graph says of its caches, of the width of an output, and of its rotary tables."""
        return _shapes(self.session, self._path, output)

    def runs(self) -> int:
        """Runs that were recorded; 0 without a profile."""
        return self.session.runs if isinstance(self.session, CountingSession) else 0

    def operator_times(self) -> list[OperatorTimes]:
        """What operators took in every run; recording ends.

        Raises:
            UsageError: the session was opened without a profile.
        """
        if self._record is None:
            raise UsageError("times of operators are recorded where a package is opened with profile")
        with self._record:
            return read_profile(Path(self.session.end_profiling()))

    def info(self) -> dict[str, Any]:
        return {
            "engine": "ort",
            "library": LIBRARY,
            "version": self._version,
            "device": "CPU",
            "threads": self._options.threads,
            "precise": self._options.precise,
            "precision": precision(self._options),
            **({} if self._kernels is None else {"kernels": self._kernels}),
            "compile_ms": round(self._compile_ms, 3),
        }


def precision(options: EngineOptions) -> dict[str, str]:
    """What a graph computes and keeps its cache in."""
    matmul = "float32" if options.precise else "as the graph says (accuracy_level)"
    return {"activations": "float32", "matmul": matmul, "kv_cache": "float32"}
