"""An encoder and a decoder on OpenVINO: sources read once, then tokens for all rows together.

    openvino_encoder_model.xml    input_features [N, mels, frames], or input_ids and attention_mask [N, E]
                                  → last_hidden_state [N, E, H]
    openvino_decoder_model.xml    input_ids [B, S], encoder_hidden_states [B, E, H], encoder_attention_mask [B, E],
                                  beam_idx [B]                             → logits [B, S, V], caches as state

A session is an infer request whose state is empty at first.  The first call makes keys and values of the source, which
the state then keeps; ``beam_idx`` says for the cache of the tokens which row each row goes on from.

Two things that OpenVINO 2026.4's CPU plugin gets wrong beside cross-attention are kept from it.  In bfloat16 a second
session reads the hidden states where the first one's lay, so inputs are copied into the request's own memory; and with
a cache of 8 bits, its default, every row but the first is wrong from the second run on, so
_ov_properties.py asks for float32, and refuses 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from roundexport.formats.package import PackageManifest
from roundexport.runtime.types import Floats, Ids, Seq2SeqSession

from ._ov_graph import Graph, Requests
from ._seq2seq import MASK, STATES, Encoded, Growing, check_sources, source_of

if TYPE_CHECKING:
    import openvino as ov


class OvSeq2Seq:
    """A model of two halves.

    Args:
        encoder: its graph.
        decoder: its graph.
        manifest: the package's description.
    """

    def __init__(self, encoder: Graph, decoder: Graph, manifest: PackageManifest) -> None:
        self._encoder, self._decoder, self._manifest = encoder, decoder, manifest
        self._readers, self._writers = Requests(encoder.compiled), Requests(decoder.compiled)

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, times of opening."""
        return self._decoder.info()

    def encode(self, inputs: Mapping[str, NDArray[Any]]) -> Encoded:
        """Read sources; see `Seq2SeqBackend.encode`."""
        request = self._readers.acquire()
        try:
            request.infer(source_of(inputs, self._encoder.inputs), share_inputs=True)
            states = request.get_tensor("last_hidden_state").data.copy()
        finally:
            self._readers.release(request)
        return Encoded(len(states), (states,), inputs.get("attention_mask"))

    def start(self, encoded: Encoded, beams: int = 1) -> Seq2SeqSession:
        """Rows without tokens; see `Seq2SeqBackend.start`."""
        check_sources(encoded, beams)
        return _Session(self._writers, self._decoder, self._manifest.max_context, encoded, beams)


class _Session(Growing):
    def __init__(self, requests: Requests, graph: Graph, max_context: int, encoded: Encoded, beams: int) -> None:
        super().__init__(encoded.rows, beams, max_context, whole_pieces=True)
        self._requests = requests
        self._request: ov.InferRequest | None = requests.acquire()
        self._request.reset_state()
        self._fixed = {STATES: np.repeat(encoded.states[0], beams, 0) if beams > 1 else encoded.states[0]}
        if MASK in graph.inputs and encoded.mask is not None:
            self._fixed[MASK] = np.repeat(encoded.mask, beams, 0)

    def _append(self, ids: Ids, order: Sequence[int] | None) -> Floats:
        assert self._request is not None
        rows = np.arange(self.rows, dtype=np.int32) if order is None else np.asarray(order, np.int32)
        self._request.infer({"input_ids": ids, "beam_idx": rows, **self._fixed})
        return self._request.get_tensor("logits").data.copy()  # type: ignore[no-any-return]

    def close(self) -> None:
        """Give the cache back."""
        if self._request is not None:
            self._request.reset_state()
            self._requests.release(self._request)
            self._request = None
