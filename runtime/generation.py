"""Writing text with a decoder: prompts in, a stream of steps out, one new token per row and step.

    prompts ──encode──▶ extend (prefill) ──logits [B, V]──▶ pick ──tokens [B]──▶ detokenise ──▶ Step
                                  ▲                                        │
                                  └───────────────── step ◀────────────────┘

A row ends at an end-of-sequence token (its text is not shown), before a stop string, after ``max_new_tokens``, or
when prompt and answer together reach the package's ``max_context``.  Finished rows stay in the batch until all are
finished, without growing, because the engines' caches keep their shape.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from roundexport.errors import UsageError
from roundexport.formats.package import PackageManifest

from .detokenizer import Detokenizer
from .sampling import Sampler
from .tokenizer import Tokenizer
from .types import (
    EOS,
    LENGTH,
    STOP,
    DecoderBackend,
    DecoderSession,
    GenerationSettings,
    Ids,
    OnText,
    Step,
)


@dataclass(frozen=True)
class Generation:
    """What one prompt brought.

    Args:
        text: the answer.
        tokens: its token ids, end-of-sequence included.
        finished: ``eos``, ``stop`` or ``length``.
        prompt_tokens: length of the prompt.
        ttft_ms: from the prompt's text to the first token; chat template and tokenization included.
        tpot_ms: mean time per further token; None with a single token.
    """

    text: str
    tokens: tuple[int, ...]
    finished: str
    prompt_tokens: int
    ttft_ms: float
    tpot_ms: float | None


class Decoder:
    """A decoder package ready to write text.

    Args:
        backend: the opened graph.
        manifest: the package's description.
        folder: the package's folder; its tokenizer is read when first needed.
    """

    def __init__(self, backend: DecoderBackend, manifest: PackageManifest, folder: Path) -> None:
        self._backend = backend
        self._folder = folder
        self._tokenizer: Tokenizer | None = None
        self.manifest = manifest

    @property
    def tokenizer(self) -> Tokenizer:
        """The package's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self._folder, self.manifest.files)
        return self._tokenizer

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, times of opening."""
        return self._backend.info()

    def start(self, batch_size: int, *, expected: int = 0) -> DecoderSession:
        """An empty session for so many rows; ``expected`` tokens per row, to size the cache once."""
        return self._backend.start(batch_size, expected=expected)

    def logits(self, ids: Ids) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Logits [B, S, V] of whole sequences [B, S] without padding, computed without a cache."""
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.manifest.max_context:
            raise UsageError(f"ids [B, S] with S from 1 to {self.manifest.max_context} expected, got {list(ids.shape)}")
        return self._backend.logits(ids)

    def encode(self, text: str, *, chat: bool = False) -> list[int]:
        """Token ids of a prompt; ``chat`` wraps it as a user's message in the chat template."""
        return self.tokenizer.encode_chat([{"role": "user", "content": text}]) if chat else self.tokenizer.encode(text)

    def generate(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], settings: GenerationSettings | None = None
    ) -> Iterator[Step]:
        """Stream new tokens of one or more prompts, all rows advancing together.

        Args:
            prompts: texts or token ids; lengths may differ.
            settings: choice of tokens and end; greedy and 128 tokens when absent.

        Raises:
            UsageError: a single string instead of a list, no prompt, an empty one, one that leaves no room in
                max_context, or a token outside the vocabulary.
        """
        settings = settings or GenerationSettings()
        if isinstance(prompts, str):
            raise UsageError("generate takes a list of prompts; put the single prompt into a list")
        rows = [self.encode(prompt) if isinstance(prompt, str) else [int(t) for t in prompt] for prompt in prompts]
        self._check(rows, settings.max_new_tokens, least=1)
        return self._steps(rows, settings)  # a generator of its own, so that the checks above run at the call

    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> list[Ids]:
        """Exactly ``count`` likeliest tokens per prompt, end-of-sequence ignored; needs no tokenizer."""
        rows = [[int(t) for t in prompt] for prompt in prompts]
        if count < 1:
            raise UsageError(f"count must be at least 1, not {count}")
        self._check(rows, count, least=count)
        sampler = Sampler(GenerationSettings(), rows)
        with self.start(len(rows), expected=max(map(len, rows)) + count) as session:
            tokens = [sampler.pick(session.extend(rows))]
            while len(tokens) < count:
                tokens.append(sampler.pick(session.step(tokens[-1])))
        return list(np.stack(tokens, 1))

    def _steps(self, rows: list[list[int]], settings: GenerationSettings) -> Iterator[Step]:
        state = [self._row(len(row), settings) for row in rows]
        sampler = Sampler(settings, rows)
        pad = next(i for i in (self.manifest.tokens["pad"], *self.manifest.tokens["eos"], 0) if i is not None)
        with self.start(len(rows), expected=max(len(r) + s.room for r, s in zip(rows, state, strict=True))) as session:
            logits = session.extend(rows)
            while True:
                tokens = sampler.pick(logits)
                now = time.perf_counter_ns()
                yield _advance(state, tokens, now)
                active = np.array([row.finished is None for row in state])
                if not active.any():
                    return
                logits = session.step(np.where(active, tokens, pad), active)

    def _row(self, prompt_tokens: int, settings: GenerationSettings) -> _Row:
        room = min(settings.max_new_tokens, self.manifest.max_context - prompt_tokens)
        eos = frozenset() if settings.ignore_eos else frozenset(self.manifest.tokens["eos"])
        return _Row(Detokenizer(self.tokenizer), eos, settings.stop, room)

    def _check(self, rows: list[list[int]], wanted: int, least: int) -> None:
        """Refuse prompts that cannot be answered with ``wanted`` tokens, or not even with ``least``."""
        if not rows:
            raise UsageError("no prompt was given")
        for number, row in enumerate(rows):
            where = f"prompt {number + 1} of {len(rows)}" if len(rows) > 1 else "the prompt"
            if not row:
                raise UsageError(f"{where} has no tokens; give it some text")
            if not (0 <= min(row) and max(row) < self.manifest.vocab_size):
                raise UsageError(f"{where} has tokens outside 0 … {self.manifest.vocab_size - 1}")
            if len(row) + least > self.manifest.max_context:
                raise UsageError(
                    f"{where} has {len(row)} tokens and {wanted} new ones were requested, but this package's "
                    f"max_context is {self.manifest.max_context} for both; shorten the prompt"
                )


class _Row:
    """One row's text and the reasons it may end."""

    def __init__(self, text: Detokenizer, eos: frozenset[int], stop: tuple[str, ...], room: int) -> None:
        self.finished: str | None = None
        self.room = room
        self._detokenizer = text
        self._eos = eos
        self._stop = stop
        self._held = ""

    def push(self, token: int) -> str:
        """Take a token and give the text that is certain now."""
        self.room -= 1
        if token in self._eos:
            self.finished = EOS
            return self._flush()
        self._held += self._detokenizer.push(token)
        cut = min((at for at in (self._held.find(s) for s in self._stop) if at >= 0), default=None)
        if cut is not None:
            self.finished = STOP
            return self._held[:cut]
        if self.room == 0:
            self.finished = LENGTH
            return self._flush()
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return given

    def _flush(self) -> str:
        self._held += self._detokenizer.finish()
        return self._held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that may be the beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _advance(state: list[_Row], tokens: Ids, now: int) -> Step:
    live = [row.finished is None for row in state]
    text = tuple(row.push(int(t)) if on else "" for row, t, on in zip(state, tokens, live, strict=True))
    return Step(
        tokens=tuple(int(t) if on else None for t, on in zip(tokens, live, strict=True)),
        text=text,
        finished=tuple(row.finished for row in state),
        t_ns=now,
    )


def collect(steps: Iterator[Step], prompt_tokens: int, began_ns: int, on_text: OnText | None = None) -> Generation:
    """Exhaust a stream of one row and sum it up; ``on_text`` gets every piece as it comes."""
    pieces: list[str] = []
    tokens: list[int] = []
    times: list[int] = []
    finished = LENGTH
    for step in steps:
        if step.tokens[0] is not None:
            tokens.append(step.tokens[0])
            times.append(step.t_ns)
        pieces.append(step.text[0])
        finished = step.finished[0] or finished
        if on_text is not None and step.text[0]:
            on_text(step.text[0])
    return Generation(
        text="".join(pieces),
        tokens=tuple(tokens),
        finished=finished,
        prompt_tokens=prompt_tokens,
        ttft_ms=(times[0] - began_ns) / 1e6,
        tpot_ms=(times[-1] - times[0]) / 1e6 / (len(times) - 1) if len(times) > 1 else None,
    )
