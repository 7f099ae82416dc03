"""An encoder and a decoder on ONNX Runtime: sources read once, then tokens for all rows together.

    encoder_model.onnx             input_features [N, mels, frames], or input_ids and attention_mask [N, E]
                                   → present.<i>.encoder.key|value [N, heads, E, D]
    decoder_with_past_model.onnx   input_ids [B, S], encoder_attention_mask [B, E],
                                   past_key_values.<i>.encoder.key|value [B, heads, E, D],
                                   past_key_values.<i>.decoder.key|value [B, heads, P, D]
                                   → logits [B, S, V], present.<i>.decoder.key|value [B, heads, P+S, D]

Rows have one length.  Rows of a beam that go on from others are picked out of the decoder's cache; keys and values of
the source are the same for all beams of it and stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.formats.package import PackageManifest
from roundexport.runtime.types import Floats, Ids, Seq2SeqSession

from ._ort_graph import Graph
from ._seq2seq import MASK, Encoded, Growing, check_sources, source_of

_PARTS = ("key", "value")


class OrtSeq2Seq:
    """A model of two halves.

    Args:
        encoder: its graph.
        decoder: its graph.
        manifest: the package's description.
    """

    def __init__(self, encoder: Graph, decoder: Graph, manifest: PackageManifest) -> None:
        self._encoder, self._decoder, self._manifest = encoder, decoder, manifest
        places = [(layer["layer"], part) for layer in manifest.kv for part in _PARTS]
        self._made = [f"present.{layer}.encoder.{part}" for layer, part in places]
        self.given = [f"past_key_values.{layer}.encoder.{part}" for layer, part in places]
        self.past = [f"past_key_values.{layer}.decoder.{part}" for layer, part in places]
        self.outputs = ["logits", *(f"present.{layer}.decoder.{part}" for layer, part in places)]

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, time of opening."""
        return self._decoder.info()

    def encode(self, inputs: Mapping[str, NDArray[Any]]) -> Encoded:
        """Read sources; see `Seq2SeqBackend.encode`."""
        feeds = source_of(inputs, self._encoder.inputs)
        made = self._encoder.session.run(self._made, feeds)
        return Encoded(len(made[0]), tuple(made), inputs.get("attention_mask"))

    def start(self, encoded: Encoded, beams: int = 1) -> Seq2SeqSession:
        """Rows without tokens; see `Seq2SeqBackend.start`."""
        check_sources(encoded, beams)
        return _Session(self, self._decoder, self._manifest, encoded, beams)


class _Session(Growing):
    def __init__(
        self, package: OrtSeq2Seq, decoder: Graph, manifest: PackageManifest, encoded: Encoded, beams: int
    ) -> None:
        super().__init__(encoded.rows, beams, manifest.max_context, whole_pieces=encoded.rows * beams == 1)
        self._decoder, self._package = decoder, package
        self._fixed: dict[str, NDArray[Any]] = {
            name: np.repeat(values, beams, 0) if beams > 1 else values
            for name, values in zip(package.given, encoded.states, strict=True)
        }
        if MASK in decoder.inputs and encoded.mask is not None:
            self._fixed[MASK] = np.repeat(encoded.mask, beams, 0)
        self._past: list[NDArray[np.float32]] = [
            np.zeros((self.rows, layer["num_kv_heads"], 0, layer["head_dim"]), np.float32)
            for layer in manifest.kv
            for _ in _PARTS
        ]

    def _append(self, ids: Ids, order: Sequence[int] | None) -> Floats:
        past = self._past if order is None else [values[np.asarray(order)] for values in self._past]
        feeds = {"input_ids": ids, **self._fixed, **dict(zip(self._package.past, past, strict=True))}
        logits, *self._past = self._decoder.session.run(self._package.outputs, feeds)
        return logits  # type: ignore[no-any-return]

    def close(self) -> None:
        """Give the cache back."""
        self._past.clear()
        self._fixed.clear()
