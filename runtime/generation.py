"""Text from a decoder: prompts in, tokens and text out, row by row as they come.

    prompts ─▶ Tokenizer ─▶ Batch of Answers over one session ─▶ steps of all rows

The rows of one call go together: step k has the k-th token of every row that has one.  Whoever wants answers that come
and go by themselves takes a `Scheduler`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from roundexport.errors import UnsupportedError, UsageError
from roundexport.formats.package import PackageManifest

from .answer import Answer, Piece
from .batch import Batch, Counts, Drafter
from .chat_template import Message
from .grammar import Grammars
from .images import Picture
from .prompt_memory import PromptMemory
from .sampling import Choice
from .settings import GenerationSettings
from .tokenizer import Tokenizer
from .types import DecoderBackend, DecoderSession, EngineChoice, Ids, Step


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
        choices: the tokens with log-probabilities, where they were asked for.
        counts: what was read, written and guessed for this prompt and its twins; None from a vendor's loop.
    """

    text: str
    tokens: tuple[int, ...]
    finished: str
    prompt_tokens: int
    ttft_ms: float
    tpot_ms: float | None
    choices: tuple[Choice, ...] = ()
    counts: Counts | None = None


class Decoder:
    """A decoder package ready to write text.

    Args:
        backend: the opened graph.
        manifest: the package's description.
        folder: the package's folder; its tokenizer is read when first needed.
    """

    choice: EngineChoice | None = None
    """Which engine `load` opened it with, and why."""
    sees: ClassVar[bool] = False
    """Whether it reads pictures."""

    def __init__(self, backend: DecoderBackend, manifest: PackageManifest, folder: Path) -> None:
        self._folder = folder
        self.backend = backend
        self.manifest = manifest

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The package's tokenizer."""
        return Tokenizer(self._folder, self.manifest.files)

    @cached_property
    def grammars(self) -> Grammars:
        """What answers of a given form share."""
        return Grammars(self.tokenizer.raw, self.manifest.vocab_size, self.manifest.tokens["eos"])

    def info(self) -> dict[str, Any]:
        """Engine, version, device, threads, effective precisions, times of opening."""
        return self.backend.info()

    def start(self, *, rows: int = 1, expected: int = 0) -> DecoderSession:
        """A session without rows; ``rows`` and ``expected`` tokens per row size its cache once, and bind nobody."""
        return self.backend.start(rows=rows, expected=expected)

    def logits(self, ids: Ids) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Logits [B, S, V] of whole sequences [B, S] without padding."""
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.manifest.max_context:
            raise UsageError(f"ids [B, S] with S from 1 to {self.manifest.max_context} expected, got {list(ids.shape)}")
        return self.backend.logits(ids)

    @property
    def token_limit(self) -> int:
        """Numbers of prompts are below this."""
        return self.manifest.vocab_size

    def encode(self, text: str, *, chat: bool = False, pictures: Sequence[Picture] = ()) -> list[int]:
        """Token ids of a prompt; ``chat`` wraps it as a user's message in the chat template.

        Raises:
            UnsupportedError: pictures are given, and this package reads text.
        """
        self.see(pictures)
        return self.tokenizer.encode_chat([{"role": "user", "content": text}]) if chat else self.tokenizer.encode(text)

    def see(self, pictures: Sequence[Picture]) -> list[Message]:
        """Read pictures; returns for each the part of a message that stands for it.

        Raises:
            UnsupportedError: this package reads text.
        """
        if pictures:
            raise UnsupportedError(
                f"{self._folder}: this package reads text, not pictures; `convert --part all` makes one that does"
            )
        return []

    def chat_text(self, messages: Sequence[Message], /, **variables: Any) -> str:
        """A conversation as the text that the model reads; see `Tokenizer.chat_prompt`."""
        return self.tokenizer.chat_prompt(messages, **variables)

    def chat_ids(self, messages: Sequence[Message], text: str, memory: PromptMemory | None = None) -> list[int]:
        """Token ids of a conversation.

        Args:
            messages: the conversation.
            text: what `chat_text` made of it.
            memory: of turns before; None: there were none.
        """
        return self.tokenizer.encode(text, add_special_tokens=False) if memory is None else memory.encode(text)

    def hold(self, prompt: Sequence[int]) -> Callable[[], None]:
        """Keep what a prompt needs beside its numbers until the function that is returned is called.

        Raises:
            UsageError: it is not kept any more.
        """
        return _nothing

    def answer(self, prompt: Sequence[int], settings: GenerationSettings, number: int = 0) -> Answer:
        """An answer to be written, for a `Batch`.

        Args:
            prompt: token ids.
            settings: choice of tokens and end.
            number: of the answer among its twins, for the draw.

        Raises:
            UsageError: the prompt is empty, leaves no room in max_context, or has a token outside the vocabulary; a
                grammar or a biased token makes no sense for this package.
            UnsupportedError: an answer with a grammar needs llguidance, which is not installed.
        """
        self.check([prompt], settings.max_new_tokens)
        if outside := [token for token in settings.logit_bias if token >= self.manifest.vocab_size]:
            raise UsageError(
                f"logit_bias names token {outside[0]}; the vocabulary ends at {self.manifest.vocab_size - 1}"
            )
        mask = None if settings.grammar is None else self.grammars.mask(settings.grammar)
        return Answer(prompt, settings, self.manifest, self.tokenizer, number, mask)

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        settings: GenerationSettings | None = None,
        drafter: Drafter | None = None,
    ) -> Iterator[Step]:
        """Stream new tokens of one or more prompts, all rows advancing together.

        Args:
            prompts: texts or token ids; lengths may differ.
            settings: choice of tokens and end; greedy and 128 tokens when absent.
            drafter: guesses tokens ahead, for a single prompt; the text stays the same.

        Raises:
            UsageError: a single string instead of a list, no prompt, an empty one, one that leaves no room in
                max_context, or a token outside the vocabulary.
        """
        settings = settings or GenerationSettings()
        if isinstance(prompts, str):
            raise UsageError("generate takes a list of prompts; put the single prompt into a list")
        rows = [self.encode(prompt) if isinstance(prompt, str) else [int(t) for t in prompt] for prompt in prompts]
        self.check(rows, settings.max_new_tokens)
        answers = [self.answer(row, settings, number) for number, row in enumerate(rows)]
        return self._steps(answers, drafter)  # a generator of its own, so that the checks above run at the call

    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> list[Ids]:
        """Exactly ``count`` likeliest tokens per prompt, end-of-sequence ignored; needs no tokenizer."""
        given = [[int(t) for t in prompt] for prompt in prompts]
        if count < 1:
            raise UsageError(f"count must be at least 1, not {count}")
        self.check(given, count, least=count)
        with self.start(rows=len(given), expected=max(map(len, given)) + count) as session:
            rows = session.add(len(given))
            tokens = [session.extend(dict(zip(rows, given, strict=True))).argmax(-1)]
            while len(tokens) < count:
                logits = session.extend({row: [token] for row, token in zip(rows, tokens[-1].tolist(), strict=True)})
                tokens.append(logits.argmax(-1))
        return list(np.stack(tokens, 1).astype(np.int64))

    def _steps(self, answers: list[Answer], drafter: Drafter | None) -> Iterator[Step]:
        longest = max(len(answer.tokens) + answer.room for answer in answers)
        batch = Batch(self.backend, rows=len(answers), expected=longest, drafter=drafter)
        finished: list[str | None] = [None] * len(answers)
        come: dict[Answer, deque[Piece]] = {answer: deque() for answer in answers}
        try:
            for answer in answers:
                batch.admit(answer)
            while None in finished:
                while not all(pieces or done for pieces, done in zip(come.values(), finished, strict=True)):
                    for answer, piece in batch.advance():
                        come[answer].append(piece)
                yield _step(list(come.values()), finished)
        finally:
            batch.close()

    def check(self, rows: Sequence[Sequence[int]], wanted: int, least: int = 1) -> None:
        """Refuse prompts that cannot be answered with ``wanted`` tokens, or not even with ``least``.

        Raises:
            UsageError: says which prompt and why.
        """
        if not rows:
            raise UsageError("no prompt was given")
        for number, row in enumerate(rows):
            where = f"prompt {number + 1} of {len(rows)}" if len(rows) > 1 else "the prompt"
            if not row:
                raise UsageError(f"{where} has no tokens; give it some text")
            if not (0 <= min(row) and max(row) < self.token_limit):
                raise UsageError(f"{where} has tokens outside 0 … {self.manifest.vocab_size - 1}")
            if len(row) + least > self.manifest.max_context:
                raise UsageError(
                    f"{where} has {len(row)} tokens and {wanted} new ones were requested, but this package's "
                    f"max_context is {self.manifest.max_context} for both; shorten the prompt"
                )


def _nothing() -> None:
    """Text needs nothing."""


def _step(come: list[deque[Piece]], finished: list[str | None]) -> Step:
    """The next piece of every row that goes on; ``finished`` is brought up to date."""
    pieces = [None if done else row.popleft() for row, done in zip(come, finished, strict=True)]
    finished[:] = [done or (piece.finished if piece else None) for piece, done in zip(pieces, finished, strict=True)]
    return Step(
        tokens=tuple(piece.choice.token if piece else None for piece in pieces),
        text=tuple(piece.text if piece else "" for piece in pieces),
        finished=tuple(finished),
        t_ns=max(piece.t_ns for piece in pieces if piece),
    )
