"""A decoder package through its vendor's own loop: the same calls as `Decoder`, for comparison and for timing.

The vendor's library keeps the cache and chooses the tokens, so there are no sessions and no logits, one text is
written at a time, and only what both sides understand alike may be asked for.  Text and stop strings are handled here.
A loop that can is given several prompts together where tokens are all that is wanted, in `greedy` and to be timed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from roundexport.errors import RoundexportError, UnsupportedError, UsageError
from roundexport.formats.package import PackageManifest

from .answer import Piece
from .batch import Drafter
from .generation import Decoder
from .sampling import Choice
from .settings import GenerationSettings
from .types import BatchLoopBackend, DecoderSession, EngineOptions, Ids, LoopBackend, Step

_OURS = frozenset({"max_new_tokens", "stop", "ignore_eos", "seed"})  # handled here, or the same everywhere
_PLAIN = frozenset({"max_new_tokens", "stop", "seed"})  # of a greedy answer, which is the same text in every loop


class LoopDecoder(Decoder):
    """A decoder package in its vendor's loop.

    Args:
        loop: the opened package.
        manifest: the package's description.
        folder: the package's folder.
    """

    def __init__(self, loop: LoopBackend, manifest: PackageManifest, folder: Path) -> None:
        super().__init__(_NoSessions(loop), manifest, folder)
        self._loop = loop

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        settings: GenerationSettings | None = None,
        drafter: Drafter | None = None,
    ) -> Iterator[Step]:
        """Stream new tokens of one prompt; see `Decoder.generate`.

        Raises:
            UsageError: as there.
            UnsupportedError: several prompts, a drafter, or settings that the library does not have.
        """
        if isinstance(prompts, str) or len(prompts) != 1 or drafter is not None:
            raise UnsupportedError(f"engine {self.info()['engine']} writes one prompt at a time, without a drafter")
        prompt = self.encode(prompts[0]) if isinstance(prompts[0], str) else [int(t) for t in prompts[0]]
        pieces = self.pieces(prompt, settings or GenerationSettings())
        return (Step((piece.choice.token,), (piece.text,), (piece.finished,), piece.t_ns) for piece in pieces)

    def pieces(self, prompt: Sequence[int], settings: GenerationSettings) -> Iterator[Piece]:
        """Write one answer, token by token.

        Args:
            prompt: token ids.
            settings: choice of tokens and end.

        Raises:
            UsageError: the prompt cannot be answered, see `Decoder.answer`.
            UnsupportedError: settings that the library does not have.
        """
        answer = self.answer(prompt, settings)

        def pieces() -> Iterator[Piece]:
            for token in self._loop.write(prompt, settings):
                yield answer.put(Choice(token))
                if answer.finished is not None:
                    return

        return pieces()  # a generator of its own, so that the checks above run at the call

    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> list[Ids]:
        """Exactly ``count`` likeliest tokens per prompt; together, or one prompt after the other."""
        self.check(prompts, count, least=count)
        if isinstance(self._loop, BatchLoopBackend):
            return [np.array(tokens, np.int64) for tokens in self.timed(prompts, count)[0]]
        return [np.array(self.timed([prompt], count)[0][0], np.int64) for prompt in prompts]

    def timed(self, prompts: Sequence[Sequence[int]], count: int) -> tuple[list[list[int]], list[int]]:
        """Exactly ``count`` greedy tokens of each prompt, and `time.perf_counter_ns` when all had the first, second, ….

        Raises:
            UnsupportedError: several prompts, and the loop writes one at a time.
            RoundexportError: the loop ended before an answer had as many.
        """
        settings = GenerationSettings(max_new_tokens=count, ignore_eos=True)
        tokens: list[list[int]] = [[] for _ in prompts]
        times = [0] * count
        for place, token in self._together(prompts, settings):
            times[len(tokens[place])] = time.perf_counter_ns()
            tokens[place].append(token)
            if len(tokens[place]) == count and all(len(row) == count for row in tokens):
                break
        for place, row in enumerate(tokens, 1):
            if len(row) < count:
                raise RoundexportError(
                    f"engine {self.info()['engine']} wrote {len(row)} of {count} tokens of prompt {place} of "
                    f"{len(prompts)}, though nothing was to end it; time another engine, or ask for fewer tokens"
                )
        return tokens, times

    def _together(self, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> Iterator[tuple[int, int]]:
        if len(prompts) == 1:
            return ((0, token) for token in self._loop.write(prompts[0], settings))
        if not isinstance(self._loop, BatchLoopBackend):
            raise UnsupportedError(f"engine {self.info()['engine']} writes one prompt at a time")
        return self._loop.together(prompts, settings)


class _NoSessions:
    """Stands where `Decoder` has its sessions, and says that there are none."""

    def __init__(self, loop: LoopBackend) -> None:
        self.info = loop.info

    def start(self, *, rows: int = 1, expected: int = 0) -> DecoderSession:
        raise self._none()

    def logits(self, ids: Ids) -> Any:
        raise self._none()

    def _none(self) -> UnsupportedError:
        return UnsupportedError(
            f"engine {self.info()['engine']} is its vendor's loop, which gives tokens and no logits; "
            "open the package with engine auto"
        )


def refuse_settings(settings: GenerationSettings, understood: frozenset[str], engine: str) -> None:
    """Refuse settings that a library does not have.

    Args:
        settings: what was asked for.
        understood: names of settings that it has, beside those handled here.
        engine: its name, for the error.

    Raises:
        UnsupportedError: names them.
    """
    if unknown := sorted(_changed(settings) - understood - _OURS):
        raise UnsupportedError(f"engine {engine} has no {', '.join(unknown)}; open the package with engine auto")


def beyond_plain(settings: GenerationSettings) -> list[str]:
    """Names of settings with which loops may write different texts: all but length and stop strings."""
    return sorted(_changed(settings) - _PLAIN)


def _changed(settings: GenerationSettings) -> set[str]:
    plain = GenerationSettings()
    return {field.name for field in fields(settings) if getattr(settings, field.name) != getattr(plain, field.name)}


def loop_info(
    engine: str, library: str, version: str, options: EngineOptions, precision: dict[str, Any], began: float
) -> dict[str, Any]:
    """What an opened loop says of itself.

    Args:
        engine: its name.
        library: the module that it is in.
        version: of the library.
        options: what it was opened with.
        precision: of activations, products and cache.
        began: `time.perf_counter` before it was opened.
    """
    return {
        "engine": engine,
        "library": library,
        "version": version,
        "device": "CPU",
        "threads": options.threads,
        "precise": options.precise,
        "precision": precision,
        "compile_ms": round((time.perf_counter() - began) * 1e3, 3),
    }


def check_device(device: str, engine: str) -> None:
    """Refuse a device that a vendor's loop is not used with here.

    Raises:
        UsageError: a device other than the CPU.
    """
    if device.upper() != "CPU":
        raise UsageError(f"engine {engine} is timed on CPU here, not on {device!r}")
