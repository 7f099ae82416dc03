"""The outermost layer: gives every request an id, counts those that run, turns away what comes too much or too late.

Reading a body, rendering a template, tokenizing and looking at pictures come before a package's own queue can say that
it is full.  So requests that ask for work are counted from their heads on: there may be as many as all queues and rows
together have places, and clients share these as they share a queue (scheduler.py).

An answer that goes out before all of its request's body has come ends the connection: what stands behind it on the wire
is not a request, and uvicorn would read it, without limit, to find where the next one begins.

The log has a line per request, also of one that is turned away: method, path, status, milliseconds.  What was asked and
answered is never in it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from roundexport.runtime.scheduler import is_full

from .errors import LOG, ApiError
from .service import Service


class InFlight:
    """ASGI middleware.

    Args:
        app: what answers.
        service: whose counts are kept, and whose ``draining`` and ``places`` are heeded.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name, began, status = f"req_{secrets.token_hex(12)}", time.perf_counter(), 0
        headers = Headers(scope=scope)
        whole = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers

        async def counted() -> Message:
            nonlocal whole
            message = await receive()
            whole = whole or (message["type"] == "http.request" and not message.get("more_body", False))
            return message

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = name
                headers.setdefault("x-content-type-options", "nosniff")
                if not whole:
                    headers["connection"] = "close"
            await send(message)

        scope.setdefault("state", {})["arrived"] = asyncio.get_running_loop().time()
        client = self._service.client(HTTPConnection(scope)) if scope["method"] == "POST" else None
        try:
            if client is not None and (refused := self._refused(client)) is not None:
                self._service.metrics.refused.labels(refused.code).inc()
                await refused.response()(scope, counted, named)
            else:
                with self._counted(client):
                    await self._app(scope, counted, named)
        finally:
            took = 1000 * (time.perf_counter() - began)
            LOG.info("%s %s %s %d %.1f ms", name, scope["method"], ascii(scope["path"][:200]), status, took)

    @contextmanager
    def _counted(self, client: Hashable | None) -> Iterator[None]:
        """While it lasts, a request is being answered; of a client, if it asks for work."""
        posts = self._service.posts
        self._service.running += 1
        if client is not None:
            posts[client] += 1
        try:
            yield
        finally:
            self._service.running -= 1
            if client is not None:
                posts[client] -= 1
                posts += Counter()  # without those who have none

    def _refused(self, client: Hashable) -> ApiError | None:
        """Why a client's request for work is not taken now."""
        headers = {"retry-after": "1"}
        if self._service.draining:
            text = "the server is stopping; try again elsewhere or later"
            return ApiError(503, text, code="stopping", headers={**headers, "connection": "close"})
        if is_full(self._service.posts, client, self._service.places):
            text = f"{self._service.posts.total()} requests are being answered already; try again in 1 s"
            return ApiError(429, text, code="queue_full", headers=headers)
        return None
