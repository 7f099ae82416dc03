"""ONNX Runtime: decoders with a KV cache (_ort_decoder.py), encoders, and both together (_ort_seq2seq.py).

Decoder graph: ``input_ids`` [B, S], ``attention_mask`` [B, T], perhaps ``position_ids`` [B, S],
``past_key_values.i.key|value`` [B, Hkv, P, D] to ``logits`` [B, S, V], ``present.i.key|value``, with attention by
com.microsoft.GroupQueryAttention; in the standard dialect in plain operators (_ort_growing.py).

Source: kernel contracts at https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md;
tests/runtime/test_sessions.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roundexport.errors import ArtifactError, UnsupportedError
from roundexport.formats.package import PackageManifest
from roundexport.runtime.token_rows import TokenRows
from roundexport.runtime.types import (
    DecoderBackend,
    EncoderBackend,
    EngineOptions,
    Floats,
    Ids,
    Product,
    Seq2SeqBackend,
)
from roundexport.types import EMBEDS, PAIRS, VECTORS, output_of

from ._claims import check_claims
from ._ort_decoder import OrtDecoder
from ._ort_graph import Graph, listed_graph
from ._ort_levels import products as products_of
from ._ort_seq2seq import OrtSeq2Seq
from ._parts import ROWS, VISION
from ._seq2seq import ENCODERS

TARGET, LIBRARY, EXTRA = "onnx", "onnxruntime", "onnx"


def open(
    folder: Path, manifest: PackageManifest, options: EngineOptions
) -> DecoderBackend | EncoderBackend | Seq2SeqBackend:
    """Open a package's graph.

    Raises:
        UnsupportedError: another device than CPU was asked for.
        ArtifactError: ONNX Runtime refuses the graph, or the manifest describes another one.
    """
    if options.device.upper() != "CPU":
        raise UnsupportedError(f"engine ort runs on CPU only, not on {options.device!r}; export for openvino instead")
    graph = Graph(listed_graph(folder, manifest), options)
    output = output_of(manifest.task, manifest.pooling)
    check_claims(manifest, graph.shapes(output), folder)
    if manifest.task in PAIRS:
        return OrtSeq2Seq(Graph(listed_graph(folder, manifest, ENCODERS[TARGET]), options), graph, manifest)
    if manifest.settings.get(EMBEDS):
        table = Graph(listed_graph(folder, manifest, ROWS[TARGET]), options)
        graph.rows = TokenRows(lambda ids: _rows(table, ids), manifest.vocab_size, graph.row_width)
    return OrtDecoder(graph, manifest) if manifest.task == "generate" else OrtEncoder(graph, output)


def products(folder: Path, manifest: PackageManifest) -> tuple[Product, ...]:
    """Products of a package's graph that have an accuracy level of their own.

    Raises:
        ArtifactError: this is not an ONNX file.
    """
    path = listed_graph(folder, manifest)
    try:
        return products_of(path.read_bytes())
    except (ValueError, IndexError, TypeError) as error:
        raise ArtifactError(f"{path}: this is not an ONNX file, or is damaged") from error


def open_vision(folder: Path, manifest: PackageManifest, options: EngineOptions) -> EncoderBackend:
    """Open the graph that reads pictures, of a package that has one beside its decoder's.

    Raises:
        ArtifactError: ONNX Runtime refuses the graph.
    """
    return OrtEncoder(Graph(listed_graph(folder, manifest, VISION[TARGET]), options), output_of("embed_image"))


def _rows(table: Graph, ids: Ids) -> Floats:
    return table.session.run([EMBEDS], {"input_ids": ids})[0]  # type: ignore[no-any-return]


class OrtEncoder:
    """A graph without a cache, of hidden states or a head's logits."""

    def __init__(self, graph: Graph, output: str) -> None:
        self._graph, self._output = graph, output
        given = {node.name for node in graph.session.get_outputs()}
        self._vector = next((name for name in VECTORS if name in given), output)

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, time of opening."""
        return self._graph.info()

    def output(self, inputs: Mapping[str, Any], vector: bool = False) -> Floats:
        """What the graph gives; inputs by name, those that the graph lacks are left out."""
        feeds = {name: array for name, array in inputs.items() if name in self._graph.inputs}
        wanted = self._vector if vector else self._output
        return self._graph.session.run([wanted], feeds)[0]  # type: ignore[no-any-return]
