"""The verb `serve`: packages behind OpenAI's interface, until told to stop."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from .shared_options import Engine, Properties, RuntimeDevice, Threads, named_values


def serve(  # noqa: PLR0913, PLR0917
    packages: Annotated[
        list[str], typer.Argument(metavar="PACKAGE…", help="Package folders; NAME=FOLDER gives one another name.")
    ],
    port: Annotated[int, typer.Option(help="0 takes any free one.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that others can reach needs a key.")
    ] = "127.0.0.1",
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="Ask every request for a key of this file, one per line; default: ROUNDEXPORT_API_KEY."),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Answer to this name too (behind a proxy); may be repeated.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Answers written at the same time, per package.")] = 16,
    queue: Annotated[int, typer.Option(help="Answers waiting, per package; beyond it: status 429.")] = 64,
    cache_tokens: Annotated[
        int | None, typer.Option(help="Tokens in the cache, per package; default: what a quarter of free memory holds.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest answer that may be asked for; default: what fits.")
    ] = None,
    max_pictures: Annotated[int, typer.Option(help="Pictures of a chat, in all its messages.")] = 8,
    request_seconds: Annotated[float, typer.Option(help="Longest time of one request.")] = 600.0,
    drain: Annotated[float, typer.Option(help="Seconds that running requests have when told to stop.")] = 30.0,
    engine: Engine = "auto",
    device: RuntimeDevice = "CPU",
    threads: Threads = None,
    properties: Properties = None,
) -> None:
    """Serve packages to OpenAI's clients, curl and a browser: http://127.0.0.1:8000."""
    from roundexport.runtime.server.running import serve as run
    from roundexport.runtime.server.security import read_keys
    from roundexport.runtime.server.settings import ServerSettings

    settings = ServerSettings(
        host=host, port=port, keys=read_keys(api_key_file), allow_hosts=tuple(allow_host or ()), rows=rows, queue=queue,
        max_choices=min(16, queue), cache_tokens=cache_tokens, max_tokens=max_tokens, max_pictures=max_pictures,
        request_s=request_seconds, drain_s=drain,
    )  # fmt: skip
    _log()

    def opened(address: str, names: list[str]) -> None:
        print(f"serving {', '.join(names)} at {address}; the interface is {address}/v1", file=sys.stderr, flush=True)

    told = named_values(properties, "--property")
    run(packages, settings, engine=engine, device=device, threads=threads, properties=told, on_open=opened)


def _log() -> None:
    """A line per request on stderr, and what goes wrong."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("roundexport.server", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
