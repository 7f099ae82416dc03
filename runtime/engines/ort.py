"""ONNX Runtime: decoders with one KV buffer bound as past and present, and encoders.

Decoder graph: ``input_ids`` [B, S], ``attention_mask`` [B, T], perhaps ``position_ids`` [B, S],
``past_key_values.i.key|value`` [B, Hkv, P, D] to ``logits`` [B, S, V], ``present.i.key|value``.  Its attention is
com.microsoft.GroupQueryAttention:

- The kernel takes each row's length from the sum of its mask, so rows of unequal length are padded on the **right**;
  a row's new key goes to the cache row behind its last valid one.
- Where past and present are the same buffer of fixed capacity, the kernel writes the new rows in place; a decode step
  then copies nothing.  The buffer grows by reallocation, up to ``max_context``.
- Several new tokens on a cache that is not empty are possible for one row only (a chat turn); for more the kernel
  refuses.

Logits of a long prompt cost a product with the whole vocabulary per token, and only the last one's are wanted.  A
graph may have an initializer ``logits_start`` (int64 [1], 0) that is overridden with -1 here, to compute the last
position only; rows of unequal length then run their last token once more.

Precise: a MatMulNBits node rounds activations to int8 if its ``accuracy_level`` is 4.  No session option undoes that
(``mlas.qnbit.force_fp32`` does for 4 bits at block size 32 only, measured), so the attribute is set to 0 in the graph's
bytes before they are handed over; the difference to the exact product goes from 1e-2 to 1e-6.

Source: kernel contracts at https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md;
tests/runtime/test_runtime_generation.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from roundexport.errors import ArtifactError, UnsupportedError, UsageError
from roundexport.formats.package import PackageManifest
from roundexport.runtime.types import Bools, DecoderBackend, DecoderSession, EncoderBackend, EngineOptions, Floats, Ids
from roundexport.storage.paths import ListedFiles
from roundexport.types import KvLayer

from ._claims import GraphShapes, check_claims, key_caches, size
from ._onnx_file import external_files, rotary_rows

TARGET, LIBRARY, EXTRA = "onnx", "onnxruntime", "onnx"
_STEP = 256  # cache rows are allocated in multiples of this
_CHUNK = 512  # tokens of one row per run: bounds logits [S, V] and attention scores [S, T]


def open(folder: Path, manifest: PackageManifest, options: EngineOptions) -> DecoderBackend | EncoderBackend:
    """Open a package's graph.

    Raises:
        UnsupportedError: another device than CPU was asked for.
        ArtifactError: ONNX Runtime refuses the graph, or the manifest describes another one.
    """
    if options.device.upper() != "CPU":
        raise UnsupportedError(f"engine ort runs on CPU only, not on {options.device!r}; export for openvino instead")
    files = ListedFiles(folder, manifest.files)
    path = files.path(manifest.model_file)
    for name in external_files(path):
        files.path(name)
    graph = _Graph(path, options)
    check_claims(manifest, graph.shapes("logits" if manifest.task == "generate" else "last_hidden_state"), folder)
    return OrtDecoder(graph, manifest) if manifest.task == "generate" else OrtEncoder(graph)


class _Graph:
    """An inference session and what it was opened with."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        import onnxruntime as ort

        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        if options.threads is not None:
            settings.intra_op_num_threads = options.threads
        model: str | bytes = str(path)
        if options.precise:
            model = without_int8_activations(path.read_bytes())
            settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        began = time.perf_counter()
        try:
            self.session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class
            raise ArtifactError(f"{path}: ONNX Runtime {ort.__version__} refuses the graph: {error}") from error
        self.inputs = frozenset(node.name for node in self.session.get_inputs())
        self.has_logits_start = "logits_start" in {n.name for n in self.session.get_overridable_initializers()}
        self._path = path
        self._options = options
        self._version = ort.__version__
        self._compile_ms = (time.perf_counter() - began) * 1e3

    def shapes(self, output: str) -> GraphShapes:
        """What the graph says of its caches, of the width of an output, and of its rotary tables."""
        keys = key_caches((node.name, tuple(node.shape)) for node in self.session.get_inputs())
        shape: list[Any] = next((node.shape for node in self.session.get_outputs() if node.name == output), [])
        return GraphShapes(keys, size(shape[-1]) if shape else None, rotary_rows(self._path))

    def info(self) -> dict[str, Any]:
        return {
            "engine": "ort",
            "library": LIBRARY,
            "version": self._version,
            "device": "CPU",
            "threads": self._options.threads,
            "precise": self._options.precise,
            "precision": {
                "activations": "float32",
                "matmul": "float32" if self._options.precise else "as the graph says (accuracy_level)",
                "kv_cache": "float32",
            },
            "compile_ms": round(self._compile_ms, 3),
        }


def without_int8_activations(graph: bytes) -> bytes:
    """A serialized ONNX graph with every ``accuracy_level`` 4 set to 0.

    An attribute is stored as field 1 (its name, here of 14 bytes) and field 3 (its value, here one byte), so a byte is
    exchanged in place and no length changes; the onnx library is not needed.
    """
    level = b"\x0a\x0eaccuracy_level\x18"
    return graph.replace(level + b"\x04", level + b"\x00")


class OrtDecoder:
    """A decoder graph."""

    def __init__(self, graph: _Graph, manifest: PackageManifest) -> None:
        self.graph = graph
        self.kv = manifest.kv
        self.max_context = manifest.max_context
        self.vocab_size = manifest.vocab_size

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, time of opening."""
        return self.graph.info()

    def start(self, batch_size: int, *, expected: int = 0) -> DecoderSession:
        """An empty session; its cache has room for ``expected`` tokens per row at once."""
        return OrtSession(self, batch_size, expected)

    def logits(self, ids: Ids) -> Floats:
        """Logits [B, S, V] of whole sequences [B, S]: one run on an empty cache."""
        batch, length = ids.shape
        feeds: dict[str, Any] = {
            "input_ids": ids.astype(np.int64, copy=False),
            "attention_mask": np.ones((batch, length), np.int64),
            "position_ids": np.tile(np.arange(length, dtype=np.int64), (batch, 1)),
        }
        for name, array in _empty_cache(self.kv, batch, 0).items():
            feeds[f"past_key_values.{name}"] = array
        feeds = {name: array for name, array in feeds.items() if name in self.graph.inputs}
        return self.graph.session.run(["logits"], feeds)[0]  # type: ignore[no-any-return]


class OrtSession:
    """A batch whose KV buffer is bound as past and present.

    Args:
        decoder: the graph.
        batch_size: rows.
        expected: tokens per row to have room for from the start.
    """

    def __init__(self, decoder: OrtDecoder, batch_size: int, expected: int) -> None:
        self._decoder = decoder
        self._run = decoder.graph.session.run_with_iobinding
        self._binding = decoder.graph.session.io_binding()
        self._lengths = np.zeros(batch_size, np.int64)
        self._capacity = 0
        self._cache: dict[str, Floats] = _empty_cache(decoder.kv, batch_size, 0)
        self._kept: dict[
            str, tuple[Ids | Floats, Any]
        ] = {}  # arrays and values that point into them: alive while bound
        self._step_ids = np.zeros((batch_size, 1), np.int64)
        self._step_logits = np.zeros((batch_size, 1, decoder.vocab_size), np.float32)
        self._mask = np.ones(0, np.int64)
        self._reserve(min(max(expected, 1), decoder.max_context))

    @property
    def lengths(self) -> Ids:
        """Tokens in the cache per row, [B]."""
        return self._lengths

    def extend(self, rows: Sequence[Sequence[int]]) -> Floats:
        """Append tokens to every row and give the logits [B, V] after the last one of each.

        Raises:
            UsageError: a row is empty, or would exceed ``max_context``.
            UnsupportedError: several rows and tokens on a cache that is not empty.
        """
        counts = np.array([len(row) for row in rows], np.int64)
        if len(rows) != len(self._lengths) or counts.min() < 1:
            raise UsageError(f"{len(self._lengths)} rows of at least one token expected, got lengths {counts.tolist()}")
        if counts.max() == 1:
            return self.step(np.array([row[0] for row in rows], np.int64))
        if len(rows) > 1 and self._lengths.any():
            raise UnsupportedError(
                "ONNX Runtime's GroupQueryAttention appends several tokens to a filled cache for one row only; "
                "append them one by one with step(), or use one session per row"
            )
        if len(rows) > 1:
            return self._extend(rows, counts)
        self._reserve(int(self._lengths[0]) + len(rows[0]))
        for start in range(0, len(rows[0]), _CHUNK):
            chunk = rows[0][start : start + _CHUNK]
            logits = self._extend([chunk], np.array([len(chunk)]))
        return logits

    def _extend(self, rows: Sequence[Sequence[int]], counts: Ids) -> Floats:
        width = int(counts.max())
        self._reserve(int(self._lengths.max()) + width)
        ids = np.zeros((len(rows), width), np.int64)
        for row, tokens in enumerate(rows):
            ids[row, : counts[row]] = tokens
        positions = self._lengths[:, None] + np.arange(width)
        self._lengths = self._lengths + counts
        last_only = self._decoder.graph.has_logits_start
        logits = np.empty((len(rows), 1 if last_only else width, self._decoder.vocab_size), np.float32)
        self._bind_input("logits_start", np.array([-1 if last_only else 0], np.int64))
        self._forward(ids, positions, logits)
        if not last_only:
            return logits[np.arange(len(rows)), counts - 1]
        return logits[:, 0] if (counts == width).all() else self._repeat_last([row[-1] for row in rows])

    def _repeat_last(self, tokens: Sequence[int]) -> Floats:
        """Logits of each row's last token, run once more in its place: the last column was padding in shorter rows."""
        self._step_ids[:, 0] = tokens
        self._forward(self._step_ids, self._lengths[:, None] - 1, self._step_logits)
        return self._step_logits[:, 0]

    def step(self, tokens: Ids, active: Bools | None = None) -> Floats:
        """Append one token [B] to every active row; logits [B, V] are overwritten by the next call.

        A row that is not active writes over its own last cache row, which nobody reads any more.
        """
        lengths = self._lengths + (1 if active is None else active)
        self._reserve(int(lengths.max()))
        self._step_ids[:, 0] = tokens
        self._lengths = lengths
        self._forward(self._step_ids, lengths[:, None] - 1, self._step_logits)
        return self._step_logits[:, 0]

    def close(self) -> None:
        """Free the cache."""
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        self._kept.clear()
        self._cache.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _forward(self, ids: Ids, positions: Ids, logits: Floats) -> None:
        self._bind_input("input_ids", ids)
        self._bind_input("attention_mask", self._attention_mask())
        self._bind_input("position_ids", np.ascontiguousarray(positions))
        self._bind_output("logits", logits)
        self._run(self._binding)

    def _attention_mask(self) -> Ids:
        """int64 [B, T]: ones for each row's tokens, then zeros; only their sum counts."""
        total = int(self._lengths.max())
        if len(self._lengths) == 1:
            return self._mask[:total].reshape(1, total)
        return (np.arange(total) < self._lengths[:, None]).astype(np.int64)

    def _reserve(self, tokens: int) -> None:
        """Have room for so many tokens per row; grows by half at least, never beyond max_context."""
        if tokens > self._decoder.max_context:
            raise UsageError(f"{tokens} tokens exceed this package's max_context of {self._decoder.max_context}")
        if tokens <= self._capacity:
            return
        wanted = -(-max(tokens, self._capacity * 3 // 2) // _STEP) * _STEP
        capacity = min(wanted, self._decoder.max_context)
        used = int(self._lengths.max())
        for name, grown in _empty_cache(self._decoder.kv, len(self._lengths), capacity).items():
            grown[:, :, :used] = self._cache[name][:, :, :used]
            self._cache[name] = grown
            value = _value(grown)
            self._kept[name] = (grown, value)
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            self._binding.bind_ortvalue_output(f"present.{name}", value)
        self._capacity = capacity
        self._mask = np.ones(capacity, np.int64)

    def _bind_input(self, name: str, array: Ids) -> None:
        graph = self._decoder.graph
        if name not in graph.inputs and not (name == "logits_start" and graph.has_logits_start):
            return
        if self._newly_kept(name, array):
            self._binding.bind_ortvalue_input(name, self._kept[name][1])

    def _bind_output(self, name: str, array: Floats) -> None:
        if self._newly_kept(name, array):
            self._binding.bind_ortvalue_output(name, self._kept[name][1])

    def _newly_kept(self, name: str, array: Ids | Floats) -> bool:
        """Keep an array and a value that points into it; False if that very array is bound already."""
        if name in self._kept and self._kept[name][0] is array:
            return False
        self._kept[name] = (array, _value(array))
        return True


def _value(array: Ids | Floats) -> Any:
    """An OrtValue that points into an array."""
    from onnxruntime import OrtValue

    return OrtValue.ortvalue_from_numpy(array)


def _empty_cache(kv: Sequence[KvLayer], batch: int, rows: int) -> dict[str, Floats]:
    return {
        f"{layer['layer']}.{part}": np.zeros((batch, layer["num_kv_heads"], rows, layer["head_dim"]), np.float32)
        for layer in kv
        for part in ("key", "value")
    }


class OrtEncoder:
    """An encoder graph."""

    def __init__(self, graph: _Graph) -> None:
        self._graph = graph

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, time of opening."""
        return self._graph.info()

    def hidden(self, inputs: Mapping[str, Ids]) -> Floats:
        """Last hidden states [B, S, H]; inputs [B, S] by name, those that the graph lacks are left out."""
        feeds = {name: array for name, array in inputs.items() if name in self._graph.inputs}
        return self._graph.session.run(["last_hidden_state"], feeds)[0]  # type: ignore[no-any-return]
