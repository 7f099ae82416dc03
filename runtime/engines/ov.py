"""OpenVINO: stateful decoders and encoders, on CPU, GPU or whatever else OpenVINO finds.

Decoder graph: ``input_ids`` [B, S], ``attention_mask`` [B, T] (the whole history), ``position_ids`` [B, S],
``beam_idx`` int32 [B] to ``logits`` [B, S, V]; the KV cache is the graph's own state and is forgotten by
``reset_state``.

- The mask may have holes, so rows of unequal length are padded on the **left** and every row's last token is in the
  last column; positions count the mask's ones (0 for padding).
- Logits of a long prompt cost a product with the whole vocabulary per token, and only the last one's are wanted.  When
  the package is opened, a Slice with an input ``logits_start`` is put before the last MatMul (in memory only); -1
  computes the last position, 0 all of them.
- Each session has its own infer request, hence its own state; requests are used again.

Precise: left to itself the CPU plugin keeps the cache in 8 bits, may compute in bf16 and quantize activations,
depending on the machine; with ``precise`` all of that is float32, so that numbers can be compared.  `info()` says what
is in effect.

Source: plugin properties at https://docs.openvino.ai; tests/runtime/test_runtime_generation.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from roundexport.errors import ArtifactError, UnsupportedError, UsageError
from roundexport.formats.package import PackageManifest
from roundexport.openvino_import import import_openvino
from roundexport.runtime.types import Bools, DecoderBackend, DecoderSession, EncoderBackend, EngineOptions, Floats, Ids
from roundexport.storage.paths import ListedFiles

from ._claims import GraphShapes, check_claims, key_caches, size

if TYPE_CHECKING:
    import openvino as ov

TARGET = LIBRARY = EXTRA = "openvino"
_PRECISE = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "KEY_CACHE_PRECISION": "f32",
    "VALUE_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}
_REPORTED = {
    "activations": "INFERENCE_PRECISION_HINT",
    "kv_cache": "KV_CACHE_PRECISION",
    "dynamic_quantization_group_size": "DYNAMIC_QUANTIZATION_GROUP_SIZE",
}
# What may stand between the last MatMul and the logits without mixing positions (soft caps, scales, a cast).
_ELEMENTWISE = {"Add", "Subtract", "Multiply", "Divide", "Tanh", "Convert"}
_STEP = 256  # columns of the attention mask are allocated in multiples of this


def open(folder: Path, manifest: PackageManifest, options: EngineOptions) -> DecoderBackend | EncoderBackend:
    """Open a package's graph.

    Raises:
        UnsupportedError: OpenVINO does not find the device.
        ArtifactError: OpenVINO refuses the graph, or the manifest describes another one.
    """
    ov = import_openvino()
    core = ov.Core()
    device = _device(core, options.device)
    files = ListedFiles(folder, manifest.files)
    path, weights = (files.path(name) for name in (manifest.model_file, weights_file(manifest.model_file)))
    began = time.perf_counter()
    try:
        model = core.read_model(path, weights)
        check_claims(manifest, _shapes(model, manifest), folder)
        sliced = manifest.task == "generate" and add_logits_start(model)
        read_ms = (time.perf_counter() - began) * 1e3
        began = time.perf_counter()
        compiled = core.compile_model(model, device, _properties(core, device, options))
    except RuntimeError as error:
        raise ArtifactError(f"{path}: OpenVINO {ov.get_version()} refuses the graph on {device}: {error}") from error
    times = {"read_ms": round(read_ms, 3), "compile_ms": round((time.perf_counter() - began) * 1e3, 3)}
    graph = _Graph(compiled, device, options, times)
    return OvDecoder(graph, manifest, sliced) if manifest.task == "generate" else OvEncoder(graph)


def weights_file(model_file: str) -> str:
    """The file beside an IR that holds its weights."""
    return f"{model_file.removesuffix('.xml')}.bin"


def _shapes(model: ov.Model, manifest: PackageManifest) -> GraphShapes:
    """What the graph says of its caches and of the width of its output."""
    states = (variable.get_info() for variable in model.get_variables())
    keys = key_caches((state.variable_id, _dimensions(state.data_shape)) for state in states)
    name = "logits" if manifest.task == "generate" else "last_hidden_state"
    shape = next((_dimensions(node.partial_shape) for node in model.outputs if name in node.get_names()), ())
    return GraphShapes(keys, size(shape[-1]) if shape else None)


def _dimensions(shape: ov.PartialShape) -> tuple[int | None, ...]:
    if shape.rank.is_dynamic:
        return ()
    return tuple(part.get_length() if part.is_static else None for part in shape)


def add_logits_start(model: ov.Model) -> bool:
    """Give a decoder an input ``logits_start`` (int64 [1]): the first position whose logits are computed; in place.

    Returns:
        False, and the model unchanged, if no MatMul is found behind the logits.
    """
    import openvino.opset15 as op

    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() in _ELEMENTWISE:
        node = node.input_value(0).get_node()
    if node.get_type_name() != "MatMul" or node.input_value(0).get_partial_shape().rank.get_length() != 3:
        return False
    start = op.parameter([1], np.int64, name="logits_start")
    start.output(0).get_tensor().set_names({"logits_start"})
    end, one = op.constant(np.array([2**31 - 1])), op.constant(np.array([1]))
    last = op.slice(node.input_value(0), start, end, one, one)
    node.input(0).replace_source_output(last.output(0))
    model.add_parameters([start])
    model.validate_nodes_and_infer_types()
    return True


def _device(core: ov.Core, device: str) -> str:
    name = device.upper()
    known = core.available_devices
    if name not in known and name.partition(".")[0] not in known:
        if name == "CPU":  # always there: its plugin could not be started
            raise UnsupportedError(f"OpenVINO cannot start its CPU plugin{_why_not(core, name)}; is memory low?")
        raise UnsupportedError(f"OpenVINO finds no device {device!r} here; it finds {', '.join(known)}")
    return name


def _why_not(core: ov.Core, device: str) -> str:
    try:
        core.get_property(device, "FULL_DEVICE_NAME")
    except RuntimeError as error:
        return f" ({str(error).strip().splitlines()[-1].strip()})"
    return ""


def _properties(core: ov.Core, device: str, options: EngineOptions) -> dict[str, Any]:
    known = set(core.get_property(device, "SUPPORTED_PROPERTIES"))
    wanted: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if options.threads is not None:
        wanted["INFERENCE_NUM_THREADS"] = options.threads
    if options.precise:
        wanted |= _PRECISE
    return {name: value for name, value in wanted.items() if name in known}


class _Graph:
    """A compiled model and what it was compiled with."""

    def __init__(
        self, compiled: ov.CompiledModel, device: str, options: EngineOptions, times: dict[str, float]
    ) -> None:
        self.compiled = compiled
        self.inputs = frozenset(name for node in compiled.inputs for name in node.get_names())
        self._device = device
        self._options = options
        self._times = times

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
                label: _plain(self.compiled.get_property(name)) for label, name in _REPORTED.items() if name in known
            },
            **self._times,
        }


def _plain(value: Any) -> str | int:
    """A property's value for JSON: element types by their names."""
    if isinstance(value, import_openvino().Type):
        return str(value.to_string())
    return value if isinstance(value, int) else str(value)


class _Requests:
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


class OvDecoder:
    """A stateful decoder."""

    def __init__(self, graph: _Graph, manifest: PackageManifest, has_logits_start: bool) -> None:
        self.graph = graph
        self.max_context = manifest.max_context
        self._has_logits_start = has_logits_start
        self._requests = _Requests(graph.compiled)

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, times of opening."""
        return self.graph.info()

    def start(self, batch_size: int, *, expected: int = 0) -> DecoderSession:
        """An empty session; ``expected`` tokens per row size its mask."""
        return OvSession(self, batch_size, expected)

    def logits(self, ids: Ids) -> Floats:
        """Logits [B, S, V] of whole sequences [B, S]: one run on an empty state."""
        batch, length = ids.shape
        request = self.acquire()
        try:
            positions = np.tile(np.arange(length, dtype=np.int64), (batch, 1))
            ids = ids.astype(np.int64, copy=False)
            return self.infer(request, ids, np.ones((batch, length), np.int64), positions, start=0).copy()
        finally:
            self.release(request)

    def acquire(self) -> ov.InferRequest:
        """A request with empty state."""
        return self._requests.acquire()

    def release(self, request: ov.InferRequest) -> None:
        """Forget a request's state and keep it for the next session."""
        request.reset_state()
        self._requests.release(request)

    def infer(self, request: ov.InferRequest, ids: Ids, mask: Ids, positions: Ids, start: int) -> Floats:
        """Logits [B, S or 1, V], in memory that the request writes again at its next run."""
        feeds = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "beam_idx": np.arange(len(ids), dtype=np.int32),
        }
        if self._has_logits_start:
            feeds["logits_start"] = np.array([start], np.int64)
        request.infer({name: feeds[name] for name in feeds if name in self.graph.inputs}, share_inputs=True)
        return request.get_tensor("logits").data  # type: ignore[no-any-return]


class OvSession:
    """A batch whose KV cache is the state of one infer request.

    Args:
        decoder: the graph.
        batch_size: rows.
        expected: tokens per row to have mask columns for from the start.
    """

    def __init__(self, decoder: OvDecoder, batch_size: int, expected: int) -> None:
        self._decoder = decoder
        self._request: ov.InferRequest | None = decoder.acquire()
        self._lengths = np.zeros(batch_size, np.int64)
        self._columns = 0
        self._mask = np.zeros((batch_size, max(_STEP, expected)), np.int64)

    @property
    def lengths(self) -> Ids:
        """Tokens in the cache per row, [B]."""
        return self._lengths

    def extend(self, rows: Sequence[Sequence[int]]) -> Floats:
        """Append tokens to every row and give the logits [B, V] after the last one of each.

        Raises:
            UsageError: a row is empty, or would exceed ``max_context``.
        """
        counts = np.array([len(row) for row in rows], np.int64)
        if len(rows) != len(self._lengths) or counts.min() < 1:
            raise UsageError(f"{len(self._lengths)} rows of at least one token expected, got lengths {counts.tolist()}")
        width = int(counts.max())
        ids = np.zeros((len(rows), width), np.int64)
        for row, tokens in enumerate(rows):
            ids[row, width - len(tokens) :] = tokens
        return self._append(ids, np.arange(width) >= width - counts[:, None])

    def step(self, tokens: Ids, active: Bools | None = None) -> Floats:
        """Append one token [B] to every active row, padding to others; the next call overwrites the logits [B, V]."""
        valid = np.ones(len(tokens), np.bool_) if active is None else active
        return self._append(tokens[:, None].astype(np.int64, copy=False), valid[:, None])

    def close(self) -> None:
        """Forget the state; the request goes back to the decoder."""
        if self._request is not None:
            self._decoder.release(self._request)
            self._request = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, ids: Ids, valid: Bools) -> Floats:
        """Run new tokens [B, S], of which ``valid`` [B, S] are no padding."""
        assert self._request is not None, "the session is closed"
        lengths = self._lengths + valid.sum(1)
        limit = self._decoder.max_context
        if lengths.max() > limit:
            raise UsageError(f"{lengths.max()} tokens exceed this package's max_context of {limit}")
        width = ids.shape[1]
        columns = self._columns + width
        if columns > self._mask.shape[1]:
            more = -(-max(columns, self._mask.shape[1] * 3 // 2) // _STEP) * _STEP
            self._mask = np.pad(self._mask, ((0, 0), (0, more - self._mask.shape[1])))
        self._mask[:, self._columns : columns] = valid
        positions = np.maximum(self._lengths[:, None] + valid.cumsum(1) - 1, 0)
        self._lengths, self._columns = lengths, columns
        mask = np.ascontiguousarray(self._mask[:, :columns])
        return self._decoder.infer(self._request, ids, mask, positions, start=-1)[:, -1]


class OvEncoder:
    """An encoder."""

    def __init__(self, graph: _Graph) -> None:
        self._graph = graph
        self._requests = _Requests(graph.compiled)

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, times of opening."""
        return self._graph.info()

    def hidden(self, inputs: Mapping[str, Ids]) -> Floats:
        """Last hidden states [B, S, H]; inputs [B, S] by name, those that the graph lacks are left out."""
        feeds = {name: array for name, array in inputs.items() if name in self._graph.inputs}
        request = self._requests.acquire()
        try:
            request.infer(feeds, share_inputs=True)
            return request.get_tensor("last_hidden_state").data.copy()  # type: ignore[no-any-return]
        finally:
            self._requests.release(request)
