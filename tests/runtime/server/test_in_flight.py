"""Requests counted from their heads on: nobody locks the others out, and who is turned away is told of."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from starlette.types import Message, Receive, Scope, Send

from roundexport.runtime.server.in_flight import InFlight
from roundexport.runtime.server.metrics import Metrics
from roundexport.runtime.server.models import Models
from roundexport.runtime.server.service import Service
from roundexport.runtime.server.settings import ServerSettings

KEYS = ("the-key-of-one", "the-key-of-two", "the-key-of-three")


class Asked:
    """A server's outermost layer before an application whose bodies never come."""

    def __init__(self, *keys: str) -> None:
        settings = ServerSettings(rows=1, queue=1, max_choices=1, keys=keys)
        self.service = Service(cast(Models, [object()]), settings, Metrics(cast(Models, [])))
        self._layer, self._tasks = InFlight(self._waits, self.service), list[asyncio.Task[None]]()

    async def _waits(self, scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    async def post(self, key: str = "", address: str = "10.0.0.1") -> int:
        """Send a head; the status that came, 0 where the request was taken."""
        found: list[int] = []

        async def send(message: Message) -> None:
            found.extend([message["status"]] if message["type"] == "http.response.start" else [])

        headers = [(b"content-length", b"10"), (b"authorization", f"Bearer {key}".encode())]
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/x", "headers": headers}
        scope["client"] = (address, 5)
        self._tasks.append(asyncio.create_task(self._layer(scope, asyncio.Event().wait, send)))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return found[0] if found else 0

    async def leave(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def test_a_client_that_has_all_places_leaves_some_to_the_others() -> None:
    async def run() -> None:
        server, (one, two, three) = Asked(*KEYS), KEYS
        assert [await server.post(one) for _ in range(5)] == [0, 0, 0, 429, 429]  # a client alone has all of them
        assert [await server.post(two) for _ in range(2)] == [0, 429]  # his share of three
        assert await server.post(two, "10.0.0.2") == 0, "a client is a key and an address"
        assert await server.post(one) == 429
        assert [await server.post(three) for _ in range(2)] == [0, 429], "twice as many there are never"
        assert await server.post("nobody's") == 429
        await server.leave()
        assert server.service.running == server.service.posts.total() == len(server.service.posts) == 0
        assert await server.post(one) == 0
        await server.leave()

    asyncio.run(run())


def test_words_that_are_no_key_make_no_client() -> None:
    async def run() -> None:
        server = Asked()
        assert [await server.post(f"made up {number}") for number in range(4)] == [0, 0, 0, 429]
        assert await server.post(address="10.0.0.2") == 0
        await server.leave()

    asyncio.run(run())


def test_who_is_turned_away_is_in_the_log_and_in_the_figures(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> str:
        server = Asked()
        assert [await server.post() for _ in range(5)] == [0, 0, 0, 429, 429]
        server.service.draining = True
        assert await server.post() == 503
        await server.leave()
        return server.service.metrics.text().decode()

    with caplog.at_level("INFO", "roundexport.server"):
        figures = asyncio.run(run())
    assert [line.split()[3] for line in caplog.messages] == ["429", "429", "503", "0", "0", "0"]
    assert 'roundexport_refused_requests_total{code="queue_full"} 2.0' in figures
    assert 'roundexport_refused_requests_total{code="stopping"} 1.0' in figures
