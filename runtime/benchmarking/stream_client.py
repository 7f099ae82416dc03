"""One streamed completion over HTTP, and the moment of every event, as a client sees them.

    due ──▶ sent ──▶ first event … last event ──▶ [DONE]        all in `time.perf_counter`

Works against any server with OpenAI's ``/completions``.  An event usually brings one token; a server may put several
into one, or give none for a token that ends within a character, so that tokens are taken from the stream's ``usage``.
Servers that send no usage (llama-cpp-python's) have tokens counted by events; there a last event without text only says
why the answer ended, and is left out of both.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

BUSY = 429
OK = 200
_NO_USAGE = ('"usage":null', '"usage": null')
_NO_TEXT = ('"text":""', '"text": ""')
_NO_CHOICES = ('"choices":[]', '"choices": []')


@dataclass(frozen=True)
class Sample:
    """One request.

    Args:
        due: when it was to be sent; latencies count from here.
        sent: when it was.
        ended: when its last byte had come, or its error.
        status: of HTTP; 0 where there was no answer.
        events: when each came.
        tokens: written, by ``usage``, or else events.
        prompt_tokens: read, by ``usage``.
        error: what went wrong; None for a whole answer, and for a 429.
        retry_after_s: what a 429 asks for.
    """

    due: float
    sent: float
    ended: float
    status: int
    events: tuple[float, ...] = ()
    tokens: int = 0
    prompt_tokens: int | None = None
    error: str | None = None
    retry_after_s: float = 1.0

    @property
    def whole(self) -> bool:
        """Whether it was answered to its end."""
        return self.status == OK and self.error is None and bool(self.events)

    @property
    def ttft_ms(self) -> float:
        """To the first event, in milliseconds from when it was due."""
        return 1000 * (self.events[0] - self.due)

    @property
    def e2e_ms(self) -> float:
        """To the last event, likewise."""
        return 1000 * (self.events[-1] - self.due)

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per further token."""
        return 1000 * (self.events[-1] - self.events[0]) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def gaps_ms(self) -> list[float]:
        """Between its events."""
        return [1000 * (b - a) for a, b in pairwise(self.events)]

    def tokens_between(self, start: float, end: float) -> float:
        """Tokens that came in a window, by the share of its events."""
        within = sum(start <= moment < end for moment in self.events)
        return self.tokens * within / len(self.events) if self.events else 0.0


async def complete(client: httpx.AsyncClient, url: str, body: dict[str, Any], due: float) -> Sample:
    """Send a completion and follow its stream to the end; whatever goes wrong becomes the sample's error.

    Args:
        client: connections.
        url: of ``/completions``.
        body: model, prompt, settings.
        due: when it was to be sent.
    """
    import httpx

    sent = time.perf_counter()
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with client.stream("POST", url, json=body) as reply:
            if reply.status_code != OK:
                said = (await reply.aread()).decode("utf-8", "replace")
                error = None if reply.status_code == BUSY else said[:300]
                ended, wait = time.perf_counter(), _seconds(reply.headers.get("retry-after"))
                return Sample(due, sent, ended, reply.status_code, error=error, retry_after_s=wait)
            return await _follow(reply, due, sent)
    except httpx.HTTPError as error:
        return Sample(due, sent, time.perf_counter(), 0, error=f"{type(error).__name__}: {error}")


async def _follow(reply: httpx.Response, due: float, sent: float) -> Sample:
    events: list[float] = []
    usage: dict[str, Any] = {}
    silent = False  # whether the last event has no text
    error: str | None = "the stream ended without [DONE]"
    async for line in reply.aiter_lines():
        if line == "data: [DONE]":
            error = None
        elif line.startswith('data: {"error"'):
            error = line[6:306]
            break
        elif line.startswith("data: "):
            if not _has(line, _NO_CHOICES):
                events.append(time.perf_counter())
                silent = _has(line, _NO_TEXT)
            if '"usage"' in line and not _has(line, _NO_USAGE):
                usage = json.loads(line[6:]).get("usage") or {}
    if silent and not usage and error is None:
        events.pop()
    tokens = usage.get("completion_tokens", len(events))
    ended = time.perf_counter()
    return Sample(due, sent, ended, OK, tuple(events), tokens, usage.get("prompt_tokens"), error)


def _has(line: str, marks: Sequence[str]) -> bool:
    return any(mark in line for mark in marks)


def _seconds(header: str | None) -> float:
    return float(header) if header is not None and header.isascii() and header.isdigit() else 1.0
