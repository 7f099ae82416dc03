"""OpenVINO: encoders, decoders whose rows share a pool of cache blocks or have a state each, and both together.

Decoder graph: ``input_ids``, ``attention_mask``, ``position_ids``, ``beam_idx`` to ``logits``, the KV cache as state.
On CPU it is rewritten for paged attention when it is opened, in memory only (_ov_paged.py); where that cannot be, where
layers carry other state than keys and values, and on other devices, it runs as it is (_ov_stateful.py).

What the plugin chooses by the machine, and what ``precise`` makes of it, is in _ov_properties.py; `info()` says what is
in effect.

Source: plugin properties at https://docs.openvino.ai; tests/runtime/test_sessions.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roundexport.environment.openvino_import import import_openvino
from roundexport.errors import ArtifactError, UnsupportedError
from roundexport.formats.package import MANIFEST, PackageManifest, vision_manifest
from roundexport.runtime.picture_lists import PictureLists
from roundexport.runtime.token_rows import TokenRows
from roundexport.runtime.types import (
    DecoderBackend,
    EncoderBackend,
    EngineOptions,
    Floats,
    Product,
    Seq2SeqBackend,
)
from roundexport.types import EMBEDS, GRID, PAIRS, VECTORS, output_of

from ._claims import check_claims
from ._grid import GridEncoder
from ._ov_graph import Graph, Requests, fixed_states, graph_shapes, has_axes, listed_files, row_width
from ._ov_levels import keep_float
from ._ov_levels import products as products_of
from ._ov_paged import PagedDecoder, paged
from ._ov_properties import properties
from ._ov_seq2seq import OvSeq2Seq
from ._ov_stateful import StatefulDecoder, add_logits_start
from ._parts import MERGER, POSITIONS, ROWS, VISION
from ._seq2seq import ENCODERS

if TYPE_CHECKING:
    import openvino as ov

TARGET = LIBRARY = EXTRA = "openvino"


def open(
    folder: Path, manifest: PackageManifest, options: EngineOptions
) -> DecoderBackend | EncoderBackend | Seq2SeqBackend:
    """Open a package's graph.

    Raises:
        UnsupportedError: OpenVINO does not find the device.
        ArtifactError: OpenVINO refuses the graph, or the manifest describes another one.
    """
    ov = import_openvino()
    core = ov.Core()
    device = _device(core, options.device)
    path, weights = listed_files(folder, manifest)
    began = time.perf_counter()
    try:
        model = core.read_model(path, weights)
        if options.int8_products:
            keep_float(model, options.int8_products)
        output = output_of(manifest.task, manifest.pooling)
        check_claims(manifest, graph_shapes(model, output), folder)
        states = fixed_states(model)
        axes, width = has_axes(model), row_width(model)  # which rewriting would hide
        rewritten = paged(model) if manifest.task == "generate" and device == "CPU" and not states else None
        sliced = manifest.task == "generate" and rewritten is None and add_logits_start(model)
        read_ms = (time.perf_counter() - began) * 1e3
        began = time.perf_counter()
        wanted = properties(core, device, options, cross=manifest.task in PAIRS)
        compiled = core.compile_model(rewritten.model if rewritten else model, device, wanted)
    except RuntimeError as error:
        raise ArtifactError(f"{path}: OpenVINO {ov.get_version()} refuses the graph on {device}: {error}") from error
    times = {"read_ms": round(read_ms, 3), "compile_ms": round((time.perf_counter() - began) * 1e3, 3)}
    graph = Graph(compiled, device, options, times)
    graph.axes = axes
    if manifest.task in PAIRS:
        encoder = _plain(core, *listed_files(folder, manifest, ENCODERS[TARGET]), device, options)
        return OvSeq2Seq(encoder, graph, manifest)
    if GRID in manifest.settings:
        return _grid(core, folder, manifest, OvEncoder(graph, output), options)
    if manifest.task != "generate":
        return OvEncoder(graph, output)
    if manifest.settings.get(EMBEDS):
        table = OvEncoder(_plain(core, *listed_files(folder, manifest, ROWS[TARGET]), device, options), EMBEDS)
        graph.rows = TokenRows(lambda ids: table.output({"input_ids": ids}), manifest.vocab_size, width)
    if rewritten is not None:
        return PagedDecoder(graph, rewritten.layers, manifest.max_context)
    return StatefulDecoder(graph, manifest.max_context, sliced, states)


def products(folder: Path, manifest: PackageManifest) -> tuple[Product, ...]:
    """Products of a package's graph with compressed weights, and whether the CPU plugin rounds their activations.

    Raises:
        ArtifactError: OpenVINO cannot read the graph.
    """
    path, weights = listed_files(folder, manifest)
    ov = import_openvino()
    try:
        return products_of(ov.Core().read_model(path, weights))
    except RuntimeError as error:
        raise ArtifactError(f"{path}: OpenVINO {ov.get_version()} cannot read it: {error}") from error


def open_vision(folder: Path, manifest: PackageManifest, options: EngineOptions) -> EncoderBackend:
    """Open the graph that reads pictures, of a package that has one beside its decoder's.

    Raises:
        ArtifactError: OpenVINO refuses the graph.
    """
    core = import_openvino().Core()
    own = vision_manifest(manifest)
    if own is not None and GRID in own.settings:
        return _grid(core, folder, own, _encoder(core, folder, own, MERGER, options), options)
    return _encoder(core, folder, manifest, VISION[TARGET], options)


def _encoder(core: ov.Core, folder: Path, manifest: PackageManifest, name: str, options: EngineOptions) -> OvEncoder:
    """One of a package's graphs of pictures."""
    files = listed_files(folder, manifest, name)
    return OvEncoder(_plain(core, *files, _device(core, options.device), options), output_of("embed_image"))


def _grid(
    core: ov.Core, folder: Path, manifest: PackageManifest, merger: OvEncoder, options: EngineOptions
) -> GridEncoder:
    """A tower whose graphs read lists, with the others beside its blocks."""
    lists = PictureLists.read(manifest.settings[GRID], f"{folder / MANIFEST}, settings.{GRID}")
    names = (VISION[TARGET], POSITIONS) if lists.side else (VISION[TARGET],)
    patches, *positions = (_encoder(core, folder, manifest, name, options) for name in names)
    return GridEncoder(patches, positions[0] if positions else None, merger, lists, merger.width("rotary_pos_emb"))


def _plain(core: ov.Core, path: Path, weights: Path, device: str, options: EngineOptions) -> Graph:
    """A graph as it is, compiled."""
    began = time.perf_counter()
    try:
        compiled = core.compile_model(core.read_model(path, weights), device, properties(core, device, options))
    except RuntimeError as error:
        version = import_openvino().get_version()
        raise ArtifactError(f"{path}: OpenVINO {version} refuses the graph on {device}: {error}") from error
    return Graph(compiled, device, options, {"compile_ms": round((time.perf_counter() - began) * 1e3, 3)})


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


class OvEncoder:
    """A graph without a cache, of hidden states or a head's logits."""

    def __init__(self, graph: Graph, output: str) -> None:
        self._graph, self._output = graph, output
        given = {name for port in graph.compiled.outputs for name in port.get_names()}
        self._vector = next((name for name in VECTORS if name in given), output)
        self._requests = Requests(graph.compiled)

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, times of opening."""
        return self._graph.info()

    def width(self, name: str) -> int:
        """Size of an input's last axis."""
        return int(self._graph.compiled.input(name).partial_shape[-1].get_length())

    def output(self, inputs: Mapping[str, Any], vector: bool = False) -> Floats:
        """What the graph gives; inputs by name, those that the graph lacks are left out."""
        feeds = {name: array for name, array in inputs.items() if name in self._graph.inputs}
        request = self._requests.acquire()
        try:
            request.infer(feeds, share_inputs=True)
            return request.get_tensor(self._vector if vector else self._output).data.copy()  # type: ignore[no-any-return]
        finally:
            self._requests.release(request)
