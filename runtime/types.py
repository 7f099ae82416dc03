"""The types that define the runtime: what an engine's module gives, what a user gets, and what a step of text is.

    package ──open (engines/<name>.py)──▶ DecoderBackend | EncoderBackend     arrays in, arrays out; knows no text
                                          | Seq2SeqBackend
                                              │ wrapped by generation.py, embedding.py, classifying.py
                                              ▼
                                         DecoderEngine | EncoderEngine       text in, text or vectors out

Shape letters: B rows of a batch, S new tokens, T tokens so far, V vocabulary, H hidden size.  Token ids are int64,
logits and vectors float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import UsageError

from .settings import GenerationSettings

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]

EOS = "eos"
STOP = "stop"
LENGTH = "length"


@dataclass(frozen=True)
class EngineOptions:
    """How a package is opened.

    Args:
        device: ``CPU``, or a device the engine lists (OpenVINO: ``GPU``, ``GPU.1``, ``NPU``).
        threads: worker threads; None leaves the choice to the engine.
        precise: float32 activations and cache throughout, for comparing numbers; the default is what is fast.
        properties: what the runtime itself is told beyond that, in its own names; they win over ``precise``.
        int8_products: names of products whose activations are in eight bits although ``precise``; of engines that tell
            a package's products (loading.py).
        profile: record what every operator takes, see operator_times.py; running is slower then.
        prefill_chunk: tokens of a prompt per run of the graph.
    """

    device: str = "CPU"
    threads: int | None = None
    precise: bool = False
    properties: Mapping[str, str] = field(default_factory=dict)
    profile: bool = False
    prefill_chunk: int = 512
    int8_products: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.int8_products and not self.precise:
            raise UsageError("int8_products are the exceptions of precise; without it the package says what is int8")
        if self.prefill_chunk < 1:
            raise UsageError(f"prefill_chunk must be at least 1, not {self.prefill_chunk}")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads must be at least 1, not {self.threads}")


@dataclass(frozen=True)
class Product:
    """A product with quantized weights in a package's graph.

    Args:
        name: of its node.
        layers: whose outputs it computes; several where they read one input.
        int8: whether its activations are in eight bits as the package ships.
    """

    name: str
    layers: tuple[str, ...]
    int8: bool


@dataclass(frozen=True)
class EngineChoice:
    """An engine and why it was taken; see engine_table.py.

    Args:
        engine: its name.
        why: it was taken.
        threads: that it computes with, in words; empty before it is opened.
    """

    engine: str
    why: str
    threads: str = ""

    def __str__(self) -> str:
        return f"engine {self.engine}{f', {self.threads}' if self.threads else ''}: {self.why}"


@dataclass(frozen=True)
class Step:
    """One new token per row.

    Args:
        tokens: token id of each row; None for a row that had finished before.
        text: new text of each row.  Text that may still change (half a character, the start of a stop string) comes
            with a later step.
        finished: why a row is finished (``eos``, ``stop``, ``length``), None while it goes on.
        t_ns: `time.perf_counter_ns` when the tokens were known.
    """

    tokens: tuple[int | None, ...]
    text: tuple[str, ...]
    finished: tuple[str | None, ...]
    t_ns: int


class DecoderSession(Protocol):
    """Rows of tokens, each with a KV cache of its own length; rows come, grow, are cut back, copied and go one by one.

    A row is a whole number that `add` or `fork` gives.  Rows that grow in one call are computed together.

    Attributes:
        cuts: whether rows can be cut back to any length; not so where layers carry a state of a fixed size.
    """

    cuts: bool

    def add(self, count: int = 1) -> list[int]:
        """So many new rows without tokens."""

    def extend(self, new: Mapping[int, Sequence[int]]) -> Floats:
        """Append tokens to rows and give the logits [n, V] after the last one of each, in the order of ``new``.

        The logits may be a view that the next call overwrites.

        Raises:
            UsageError: a row gets no token, or would exceed ``max_context``.
        """

    def scores(self, row: int, tokens: Sequence[int]) -> Floats:
        """Append tokens to one row and give the logits [S, V] after every one of them.

        Raises:
            UsageError: no token, or the row would exceed ``max_context``.
        """

    def reach(self, row: int, length: int) -> int:
        """The longest beginning of a row, of at most ``length`` tokens, that `fork` and `cut` can give."""

    def fork(self, row: int, length: int) -> int:
        """A new row that begins with the first ``length`` tokens of another; nothing is computed.

        Raises:
            UnsupportedError: the row cannot go on from there, see `reach`.
        """

    def cut(self, row: int, length: int) -> None:
        """Forget a row's tokens beyond the first ``length``.

        Raises:
            UnsupportedError: the row cannot go on from there, see `reach`.
        """

    def drop(self, row: int) -> None:
        """Forget a row."""

    def length(self, row: int) -> int:
        """Tokens of a row."""

    def close(self) -> None:
        """Give the cache back."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class DecoderBackend(Protocol):
    """A decoder as an engine's module opens it."""

    def start(self, *, rows: int = 1, expected: int = 0) -> DecoderSession:
        """A session without rows; ``rows`` and ``expected`` tokens per row size its cache once, and bind nobody."""

    def logits(self, ids: Ids) -> Floats:
        """Logits [B, S, V] of whole sequences [B, S] without padding."""

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, times of opening."""


class LoopBackend(Protocol):
    """A decoder whose library chooses the tokens itself: a vendor's loop, as an engine's module opens it."""

    def write(self, prompt: Sequence[int], settings: GenerationSettings) -> Iterator[int]:
        """Tokens of an answer as they come, end-of-sequence included; closing the iterator stops it.

        Raises:
            UnsupportedError: the library cannot do what the settings ask for.
        """

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, times of opening."""


@runtime_checkable
class BatchLoopBackend(LoopBackend, Protocol):
    """One that writes several answers together."""

    def together(self, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> Iterator[tuple[int, int]]:
        """Tokens of several answers as they come, each with its prompt's place; closing the iterator ends them all.

        Raises:
            UnsupportedError: the library cannot do what the settings ask for.
        """


class EncoderBackend(Protocol):
    """An encoder, with a head or without, as an engine's module opens it."""

    def output(self, inputs: Mapping[str, Any], vector: bool = False) -> Floats:
        """Last hidden states [B, S, H], or a head's logits; inputs by name, those it lacks are left out.

        With ``vector`` what a model of images makes of its hidden states, [B, D].
        """

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, times of opening."""


class Encoded(Protocol):
    """What an encoder gave of some sources; what is in it is the engine's."""

    @property
    def rows(self) -> int:
        """Sources."""


class Seq2SeqSession(Protocol):
    """Rows of tokens that answer sources, each source with as many rows as there are beams; all of one length."""

    @property
    def length(self) -> int:
        """Tokens of every row."""

    def step(self, ids: Ids, order: Sequence[int] | None = None) -> Floats:
        """Append tokens [rows, S] to the rows and give the logits [rows, S, V] after every one of them.

        Args:
            ids: tokens of all rows; a row that is finished is given any, and ignored.
            order: for each row the row of the same source that it goes on from, before its tokens are appended.

        Raises:
            UsageError: tokens of another number of rows, beyond ``max_context``, or rows of another source.
        """

    def close(self) -> None:
        """Give the cache back."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Seq2SeqBackend(Protocol):
    """A model with an encoder and a decoder, as an engine's module opens it."""

    def encode(self, inputs: Mapping[str, NDArray[Any]]) -> Any:
        """Read N sources: ``input_features`` [N, mels, frames], or ``input_ids`` and ``attention_mask`` [N, E].

        Returns:
            An :class:`Encoded`, for ``start``.

        Raises:
            UsageError: an input is missing.
        """

    def start(self, encoded: Any, beams: int = 1) -> Seq2SeqSession:
        """N·beams rows without tokens; rows n·beams … n·beams+beams-1 are of source n."""

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, times of opening."""


class DecoderEngine(Protocol):
    """A decoder package ready to write text; see generation.py."""

    def generate(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], settings: GenerationSettings = ...
    ) -> Iterator[Step]:
        """Stream new tokens of one or more prompts."""

    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> list[Ids]:
        """Exactly ``count`` likeliest tokens per prompt, end-of-sequence ignored."""

    def logits(self, ids: Ids) -> Floats:
        """Logits [B, S, V] of whole sequences [B, S]."""

    def start(self, *, rows: int = 1, expected: int = 0) -> DecoderSession:
        """A session without rows."""

    def encode(self, text: str, *, chat: bool = False) -> list[int]:
        """Token ids of a prompt; ``chat`` wraps it as a user's message in the chat template."""

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, times of opening."""


class EncoderEngine(Protocol):
    """An encoder package ready to give vectors; see embedding.py."""

    def embed(self, texts: Sequence[str], batch_size: int = ...) -> Floats:
        """Embeddings [n, H] of texts."""

    def encode(self, texts: Sequence[str]) -> dict[str, Ids]:
        """Model inputs [n, S] of texts, padded on the right."""

    def pool(self, hidden: Floats, mask: Ids) -> Floats:
        """Embeddings [n, H] from hidden states [n, S, H] and the attention mask [n, S]."""

    def hidden(self, inputs: Mapping[str, Ids]) -> Floats:
        """Last hidden states [B, S, H]."""

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, times of opening."""


Engine = DecoderEngine | EncoderEngine
OnText = Callable[[str], None]
