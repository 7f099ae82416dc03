"""What the engines' sessions of models with an encoder and a decoder have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import UsageError
from roundexport.runtime.types import Floats, Ids

from ._rows import Closing

MASK, STATES = "encoder_attention_mask", "encoder_hidden_states"
ENCODERS = {"onnx": "encoder_model.onnx", "openvino": "openvino_encoder_model.xml"}
"""The encoder's graph in a package of each target; the decoder's is the manifest's ``model_file``."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """What an encoder gave.

    Args:
        rows: sources.
        states: what the decoder needs of them, the sources along the first axis of each array.
        mask: attention mask [rows, E] of texts; None of speech.
    """

    rows: int
    states: tuple[NDArray[np.float32], ...]
    mask: NDArray[np.int64] | None


def source_of(inputs: Mapping[str, NDArray[Any]], wanted: Collection[str]) -> dict[str, NDArray[Any]]:
    """An encoder's inputs.

    Raises:
        UsageError: one is missing.
    """
    if missing := sorted(name for name in wanted if name not in inputs):
        raise UsageError(f"the encoder takes {', '.join(sorted(wanted))}; {', '.join(missing)} is missing")
    return {name: np.ascontiguousarray(inputs[name]) for name in wanted}


def check_sources(encoded: Encoded, beams: int) -> None:
    """Refuse a session without rows.

    Raises:
        UsageError: no source, or fewer than one beam.
    """
    if encoded.rows < 1 or beams < 1:
        raise UsageError(f"a session needs a source and a beam; there are {encoded.rows} and {beams}")


class Growing(Closing):
    """Rows that grow together; see `Seq2SeqSession`.

    Args:
        sources: how many.
        beams: rows of each.
        max_context: most tokens of a row.
        whole_pieces: several tokens may follow others at once; else they are appended one by one.
    """

    def __init__(self, sources: int, beams: int, max_context: int, whole_pieces: bool) -> None:
        self.rows, self.length = sources * beams, 0
        self._beams, self._max_context, self._whole_pieces = beams, max_context, whole_pieces

    def step(self, ids: Ids, order: Sequence[int] | None = None) -> Floats:
        """Append tokens [rows, S]; logits [rows, S, V]."""
        ids = np.ascontiguousarray(ids, np.int64)
        if ids.ndim != 2 or len(ids) != self.rows or not ids.shape[1]:
            raise UsageError(f"{self.rows} rows need tokens [{self.rows}, S], not {list(ids.shape)}")
        if self.length + ids.shape[1] > self._max_context:
            more = self.length + ids.shape[1]
            raise UsageError(f"{more} tokens exceed this package's max_context of {self._max_context}")
        if order is not None and [row // self._beams for row in order] != [r // self._beams for r in range(self.rows)]:
            raise UsageError(
                f"order must name for each of {self.rows} rows a row of the same source, not {list(order)}"
            )
        if self.length and ids.shape[1] > 1 and not self._whole_pieces:
            pieces = [self._append(ids[:, at : at + 1], None if at else order) for at in range(ids.shape[1])]
            logits = np.concatenate(pieces, 1)
        else:
            logits = self._append(ids, order)
        self.length += ids.shape[1]
        return logits

    @abstractmethod
    def _append(self, ids: Ids, order: Sequence[int] | None) -> Floats: ...
