"""A time limit on request heads, which uvicorn does not have.

A client that opens a connection and sends its head a byte a minute holds that connection for as long as it likes; many
of them hold all file handles that a process may have (Slowloris).  Bodies have their limit in security.py, whole
requests in sse.py and answers.py, silence between requests in uvicorn (5 s).

    first byte, or the connection itself ─▶ whole head           within ``head_s``, else 408 and the connection closes

What is not HTTP at all is refused in OpenAI's form, as everything else is.

A connection on which nothing was sent at all, as browsers open in advance, closes without a word.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError


class LimitedHeads(H11Protocol):
    """The protocol of uvicorn with that limit, which is the class's own."""

    head_s: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A head is awaited from now on."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A head has come, or the first of one."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._head_timer is None:
            self._await_head()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_s, self._late)

    def _stop(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing() or self.conn.their_state is not h11.IDLE:
            return
        if self.conn.trailing_data[0]:
            late = ApiError(408, f"the head of the request did not come within {self.head_s:g} s", code="head_too_slow")
            self.transport.write(_answer(self.conn, late))
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """What came is not HTTP; says so, unless an answer is under way already, and closes."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_answer(self.conn, ApiError(400, "this is not a request of HTTP", code="not_http")))
        self.transport.close()


def protocol(head_s: float) -> type[H11Protocol]:
    """The class for a limit of so many seconds; uvicorn makes an object of it for every connection."""
    return type("LimitedHeads", (LimitedHeads,), {"head_s": head_s})


def _answer(connection: h11.Connection, error: ApiError) -> bytes:
    body = msgspec.json.encode(error.body())
    headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
    events = (h11.Response(status_code=error.status, headers=headers), h11.Data(data=body), h11.EndOfMessage())
    return b"".join(connection.send(event) or b"" for event in events)
