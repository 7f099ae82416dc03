"""Running the application: a socket, uvicorn, and a stop that lets running requests finish.

SIGTERM or Ctrl-C ─▶ draining: /ready says 503, new requests are turned away ─▶ nothing runs, or time is up ─▶ exit 0
a second one      ─▶ exit at once
"""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from roundexport.errors import UsageError

from .app import build
from .heads import protocol
from .models import open_models
from .service import Service
from .settings import ServerSettings

_LINE = 64 * 1024  # bytes of a request's head


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which turns new requests away before it stops.

    Args:
        app: see `build`.
        settings: how long running requests may go on.
        on_open: called once requests are answered.
    """

    def __init__(self, app: Starlette, settings: ServerSettings, on_open: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            uvicorn.Config(
                app, http=protocol(settings.head_s), ws="none", loop="asyncio", lifespan="on", log_config=None,
                access_log=False, server_header=False, h11_max_incomplete_event_size=_LINE, timeout_graceful_shutdown=1,
            )
        )  # fmt: skip
        self._service: Service = app.state.service
        self._drain_s = settings.drain_s
        self._on_open = on_open
        self._until: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        self._on_open()

    def drain(self) -> None:
        """Take nothing new, and end when nothing runs or the time is up."""
        self._service.draining = True
        if self._until is None:
            self._until = time.monotonic() + self._drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On the first signal drain, on the second end."""
        if self._until is None:
            self.drain()
        else:
            self.should_exit = True
            self.force_exit = sig == signal.SIGINT

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if self._until is not None and (self._service.running == 0 or time.monotonic() >= self._until):
            self.should_exit = True
        return await super().on_tick(counter)


def listen(settings: ServerSettings) -> socket.socket:
    """A socket on the address, not yet open to anybody.

    Raises:
        UsageError: the address is taken or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        # With its protocol named: asyncio sends small answers at once only on what it knows to be TCP.
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}; "
            "choose another --port or --host"
        ) from error
    return found


def serve(
    packages: Sequence[str],
    settings: ServerSettings,
    *,
    engine: str = "auto",
    device: str = "CPU",
    threads: int | None = None,
    properties: Mapping[str, str] | None = None,
    on_open: Callable[[str, list[str]], None] | None = None,
) -> None:
    """Serve packages until told to stop.

    Args:
        packages: ``FOLDER`` or ``NAME=FOLDER`` of each.
        settings: address, keys, limits.
        engine: see `load`.
        device: see `load`.
        threads: see `load`.
        properties: see `load`.
        on_open: told address and names of the models once requests are answered.

    Raises:
        UsageError: the address cannot be had, or names of packages make no sense.
        ArtifactError: a package is damaged.
        UnsupportedError: an engine is missing.
    """
    with listen(settings) as found:
        models = open_models(packages, settings, engine=engine, device=device, threads=threads, properties=properties)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"http://{host}:{found.getsockname()[1]}"

        def opened() -> None:
            if on_open is not None:
                on_open(address, [model.name for model in models])

        server = DrainingServer(build(models, settings), settings, opened)
        asyncio.run(server.serve([found]))
