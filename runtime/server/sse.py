"""Answers over HTTP: server-sent events, and work that ends the moment its client leaves.

    data: {…}⏎⏎     per event          : waiting⏎⏎     so that nothing on the way takes silence for an end
    data: [DONE]⏎⏎  at the end

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html, as far as OpenAI uses it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
WAITING = b": waiting\n\n"
_GRACE_S = 5.0  # beyond a request's time, for its last bytes

T = TypeVar("T")
_ENCODER = msgspec.json.Encoder()


class ClientGone(Exception):  # noqa: N818  (not a failure of ours)
    """Nobody waits for this answer any more."""


def event(data: Any) -> bytes:
    """One event."""
    return b"data: " + _ENCODER.encode(data) + b"\n\n"


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of some work, which is cancelled once the client has left.

    Args:
        receive: the request's; its body was read.
        work: what the client waits for.

    Raises:
        ClientGone: the client left first.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """An answer that is sent as it comes.

    Args:
        events: what to send; closed in any case.
        deadline: `asyncio` time at which a client that does not read is left.
        on_close: called once, when the answer is over or its client gone.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], deadline: float, on_close: Callable[[], None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._deadline, self._on_close = events, deadline, on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, unless the client leaves."""
        try:
            async with asyncio.timeout_at(self._deadline + _GRACE_S):
                await while_connected(receive, self._send(send))
        except (ClientGone, TimeoutError):
            pass
        finally:
            self._on_close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
