"""The types that define the runtime: what an engine module gives, what a user gets, and what a step of text is.

    package ──open (engine_<name>.py)──▶ DecoderBackend | EncoderBackend     arrays in, arrays out; knows no text
                                              │ wrapped by generation.py, embedding.py
                                              ▼
                                         DecoderEngine | EncoderEngine       text in, text or vectors out

Shape letters: B rows of a batch, S new tokens, T tokens so far, V vocabulary, H hidden size.  Token ids are int64,
logits and vectors float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import UsageError

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

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
    """

    device: str = "CPU"
    threads: int | None = None
    precise: bool = False

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads must be at least 1, not {self.threads}")


@dataclass(frozen=True)
class GenerationSettings:
    """How tokens are chosen and when to stop.

    Args:
        max_new_tokens: most tokens per row; the package's ``max_context`` may end a row sooner.
        temperature: 0 takes the likeliest token; above 0 samples from softmax(logits / temperature).
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest likeliest tokens whose probability reaches top_p; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
        repetition_penalty: logits of tokens seen in the row are divided (positive) or multiplied (negative) by it.
        seed: fixes sampled tokens; a row's tokens depend on its number in the batch, not on its neighbors.
        stop: strings that end a row; the text stops before them.
        ignore_eos: go on after end-of-sequence tokens.

    Raises:
        UsageError: a value is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 1, "max_new_tokens must be at least 1"),
            (0 <= self.temperature < math.inf, "temperature must be finite and not negative"),
            (self.top_k >= 0, "top_k must not be negative (0 keeps all)"),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (0 <= self.min_p <= 1, "min_p must be between 0 and 1"),
            (
                0 < self.repetition_penalty < math.inf,
                "repetition_penalty must be positive and finite (1 changes nothing)",
            ),
            (0 <= self.seed < 2**64, "seed must be from 0 to 2**64 - 1"),
            (not isinstance(self.stop, str) and all(self.stop), "stop is a tuple of strings, none of them empty"),
        )
        wrong = [text for held, text in checks if not held]
        if wrong:
            raise UsageError(f"generation settings: {'; '.join(wrong)}; got {self}")


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
    """One batch and its KV cache.  Logits are a view that the next call overwrites."""

    def extend(self, rows: Sequence[Sequence[int]]) -> Floats:
        """Append tokens to every row and give the logits [B, V] after the last one.

        Raises:
            UsageError: a row is empty, or would exceed ``max_context``.
            UnsupportedError: the engine cannot append several tokens to this batch.
        """

    def step(self, tokens: Ids, active: Bools | None = None) -> Floats:
        """Append one token [B] to every row and give the logits [B, V] after it.

        Rows that are not ``active`` [B] do not grow: their token and logits mean nothing, and they cannot go on later.
        """

    @property
    def lengths(self) -> Ids:
        """Tokens in the cache per row, [B]."""

    def close(self) -> None:
        """Give the cache back."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class DecoderBackend(Protocol):
    """A decoder as an ``engine_<name>`` module opens it."""

    def start(self, batch_size: int, *, expected: int = 0) -> DecoderSession:
        """An empty session for so many rows; ``expected`` tokens per row, to size the cache once."""

    def logits(self, ids: Ids) -> Floats:
        """Logits [B, S, V] of whole sequences [B, S] without padding, computed without a cache."""

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, times of opening."""


class EncoderBackend(Protocol):
    """An encoder as an ``engine_<name>`` module opens it."""

    def hidden(self, inputs: Mapping[str, Ids]) -> Floats:
        """Last hidden states [B, S, H]; inputs [B, S] by name, those that the graph lacks are left out."""

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

    def start(self, batch_size: int, *, expected: int = 0) -> DecoderSession:
        """An empty session for so many rows."""

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
