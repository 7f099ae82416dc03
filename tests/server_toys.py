"""Toy packages behind a real server on a free port, in a thread, for the server's tests."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from roundexport.formats.package import read_package, write_manifest
from roundexport.runtime.server.app import build
from roundexport.runtime.server.models import Models, open_models
from roundexport.runtime.server.running import DrainingServer, listen
from roundexport.runtime.server.settings import ServerSettings

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} <tool_call>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Running:
    """A server in a thread, and how to reach it."""

    def __init__(self, models: Models, settings: ServerSettings) -> None:
        self.models = models
        self.socket = listen(settings)
        app = build(models, settings)
        self.service = app.state.service
        self.server = DrainingServer(app, settings)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.v1 = f"{self.url}/v1"
        self.client = httpx.Client(timeout=30)
        self._thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([self.socket])))
        self._thread.start()
        until(lambda: self.server.started)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        options = {"json": body, **options} if body is not None else options
        return self.client.post(f"{self.v1}/{path}", **options)

    def busy(self) -> int:
        return sum(model.busy() for model in self.models)

    def stop(self) -> None:
        self.server.drain()
        self.client.close()
        self._thread.join(20)
        assert not self._thread.is_alive()


def until(held: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for something to come about."""
    end = time.monotonic() + seconds
    while not held():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.005)


def with_chat(folder: Path) -> Path:
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    write_manifest(folder, read_package(folder))
    return folder


@contextmanager
def running(packages: Sequence[str | Path], **settings: Any) -> Iterator[Running]:
    """A server of one's own."""
    chosen = ServerSettings(**{"port": 0, "drain_s": 5.0, **settings})
    found = Running(open_models([str(path) for path in packages], chosen, threads=1), chosen)
    try:
        yield found
    finally:
        found.stop()
