"""What every endpoint needs: packages, limits, metrics; and the frame in which a request is answered."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from .answers import Answers, Caller
from .errors import ApiError, as_api_error
from .metrics import Metrics, Observation
from .models import Models
from .settings import ServerSettings
from .sse import ClientGone, EventStream, event

GONE = 499  # nobody reads it; nginx's number for a client that left


@dataclass
class Service:
    """A server's state.

    Args:
        models: the packages.
        settings: limits.
        metrics: what is counted.
        draining: nothing new is taken.
        running: requests being answered.
        posts: those of them that ask for work, by client.
    """

    models: Models
    settings: ServerSettings
    metrics: Metrics
    draining: bool = False
    running: int = 0
    posts: Counter[Hashable] = field(default_factory=Counter)

    @property
    def places(self) -> int:
        """Requests for work that have places from their heads on: what may be written or wait, of all packages."""
        return len(list(self.models)) * (self.settings.rows + 2 * self.settings.queue)

    def deadline(self, request: Request) -> float:
        """When a request must be over, in the loop's time."""
        return float(request.state.arrived) + self.settings.request_s

    def client(self, request: HTTPConnection) -> tuple[str, str]:
        """Who asks: a key, if there are keys, and an address."""
        given = request.headers.get("authorization", "").partition(" ")[2].strip() if self.settings.keys else ""
        return given, "" if request.client is None else request.client.host

    def caller(self, request: Request) -> Caller:
        """Who asks, and until when."""
        return Caller(self.client(request), self.deadline(request))


def service_of(request: Request) -> Service:
    """The service behind a request."""
    found: Service = request.app.state.service
    return found


def as_json(data: Any, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(msgspec.json.encode(data, enc_hook=str), status, media_type="application/json")


def new_id(kind: str) -> str:
    """An id in OpenAI's style."""
    return f"{kind}-{secrets.token_hex(12)}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


@asynccontextmanager
async def watched(seen: Observation) -> AsyncIterator[None]:
    """Count a request that fails before it is answered."""
    try:
        yield
    except BaseException as error:
        seen.end(error_kind(error))
        raise


def error_kind(error: BaseException) -> str:
    """What an error is called in metrics."""
    if isinstance(error, ClientGone | asyncio.CancelledError):
        return "client_gone"
    if isinstance(error, TimeoutError):
        return "timeout"
    return (error.code or str(error.status)) if isinstance(error, ApiError) else type(error).__name__


def stream(answers: Answers, seen: Observation, events: AsyncIterator[bytes]) -> EventStream:
    """An event stream that tells its errors as events, and whose answers end with it."""

    def close() -> None:
        answers.cancel()
        seen.end("client_gone", answers.prompt_tokens, answers.new_tokens)

    return EventStream(_safe(answers, seen, events), answers.caller.deadline, close)


async def _safe(answers: Answers, seen: Observation, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        async for data in events:
            yield data
    except Exception as error:
        seen.end(error_kind(error), answers.prompt_tokens, answers.new_tokens)
        yield event(as_api_error(error).body())
    else:
        count(answers, seen)


def count(answers: Answers, seen: Observation) -> None:
    """Count a request whose answers are finished."""
    for written in answers.written:
        seen.answer(written.tokens, written.first_ns, written.last_ns)
    seen.waited(answers.waits_ns)
    seen.end("", answers.prompt_tokens, answers.new_tokens)


def usage(answers: Answers) -> dict[str, Any]:
    """Tokens of a request, in OpenAI's form."""
    read, written = answers.prompt_tokens, answers.new_tokens
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": answers.cached_tokens},
    }
