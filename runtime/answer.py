"""One answer being written: its tokens, its text, and why it ends.

    logits ─▶ Sampler ─▶ token ─▶ Detokenizer ─▶ text, held back while it may be the beginning of a stop string

An answer ends at an end-of-sequence token (its text is not shown), before a stop string, when its grammar is complete,
after ``max_new_tokens``, or when prompt and answer together reach the package's ``max_context``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from roundexport.formats.package import PackageManifest

from .detokenizer import Detokenizer
from .sampling import Choice, Sampler, TokenMask
from .settings import GenerationSettings
from .tokenizer import Tokenizer
from .types import EOS, LENGTH, STOP, Floats


@dataclass(frozen=True)
class Piece:
    """What one token brought.

    Args:
        choice: the token, and its log-probabilities if they were asked for.
        text: text that is certain now.  Text that may still change (half a character, the start of a stop string)
            comes with a later piece.
        finished: why the answer ends here (``eos``, ``stop``, ``length``), or None.
        t_ns: `time.perf_counter_ns` when the token was known.
    """

    choice: Choice
    text: str
    finished: str | None
    t_ns: int


class Answer:
    """One answer and its prompt.

    Args:
        prompt: token ids, at least one, with room for an answer.
        settings: how tokens are chosen and when to stop.
        manifest: the package's description.
        tokenizer: the package's tokenizer.
        number: of the answer in its batch, for the draw.
        mask: which tokens may come; None: all.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        settings: GenerationSettings,
        manifest: PackageManifest,
        tokenizer: Tokenizer,
        number: int = 0,
        mask: TokenMask | None = None,
    ) -> None:
        self.tokens = list(prompt)
        self.prompt_len = len(self.tokens)
        self.finished: str | None = None
        self.reused = 0  # tokens of the prompt that were in the cache already
        self.room = min(settings.max_new_tokens, manifest.max_context - self.prompt_len)
        read = [token for token in self.tokens if token < manifest.vocab_size]  # and not rows of pictures
        self._sampler = Sampler(settings, read, number, mask)
        self._mask = mask
        self._detokenizer = Detokenizer(tokenizer, settings.show)
        self.eos = frozenset() if settings.ignore_eos else frozenset(manifest.tokens["eos"])
        self._stop = settings.stop
        self._held = ""

    @property
    def new_tokens(self) -> list[int]:
        """Tokens of the answer so far, end-of-sequence included."""
        return self.tokens[self.prompt_len :]

    def take(self, logits: Floats) -> Piece:
        """Choose the next token from logits [V]."""
        return self.put(self._sampler.choose(logits))

    def put(self, choice: Choice) -> Piece:
        """Go on with a token that was chosen."""
        now = time.perf_counter_ns()
        self.tokens.append(choice.token)
        return Piece(choice, self._text(choice.token), self.finished, now)

    def _text(self, token: int) -> str:
        """Text that is certain behind a token; sets ``finished``."""
        self.room -= 1
        ended = None if self._mask is None else self._mask.ended
        if token in self.eos and ended != LENGTH:
            self.finished = EOS
            return self._flush()
        self._held += self._detokenizer.push(token)
        if not self._stop and ended is None and self.room:
            given, self._held = self._held, ""
            return given
        cut = min((at for at in (self._held.find(s) for s in self._stop) if at >= 0), default=None)
        if cut is not None:
            self.finished = STOP
            return self._held[:cut]
        if ended is not None or self.room == 0:
            self.finished = ended or LENGTH
            return self._flush()
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return given

    def _flush(self) -> str:
        """What is held back, up to a stop string that the last characters complete."""
        self._held += self._detokenizer.finish()
        cut = min((at for at in (self._held.find(s) for s in self._stop) if at >= 0), default=None)
        if cut is not None:
            self.finished = STOP
            return self._held[:cut]
        return self._held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that may be the beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
