"""Packages behind Ray Serve: replicas of our server's application, any of which may die.

    pip install 'roundexport[onnx,ray]'
    python samples/serving/ray_serve.py PACKAGE [--replicas 2] [--threads 1] [--port 8000]     on this machine
    serve run --working-dir samples/serving ray_serve:application package=/models/onnx replicas=4   on a cluster

Every replica is a process with the package, its scheduler and the whole interface: /v1, /metrics, the page.  Serve's
proxy hands requests to the replica that has fewest, starts another one where one dies, and drains those that leave.
Requests that were under way in a replica that dies end with it, as its cache is gone: a stream breaks off without
``[DONE]``, anything else is a 5xx, and the client asks again.  No other request notices.  Answers say who gave them
(``x-replica``: the process).

- ``max_ongoing_requests`` is what a replica's scheduler writes and holds waiting; Serve's own default of 5 would leave
  its batch half empty.  Beyond that, requests wait in the proxy.
- A replica counts as ``threads`` CPUs, which is also how many threads its engine has.
- Keys are read in the replica from ROUNDEXPORT_API_KEY; without one it answers to names of this machine alone.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from roundexport.errors import RoundexportError
from roundexport.formats.package import read_package
from roundexport.runtime.server.settings import ServerSettings

ROWS, QUEUE = 16, 64


def application(arguments: dict[str, Any]) -> Application:
    """The deployment, for ``serve run`` and for `main`.

    Args:
        arguments: ``package``, a folder that every replica can read; ``replicas`` (2); ``threads`` of each (1);
            ``engine`` (auto).
    """
    package, threads = str(Path(arguments["package"]).resolve()), int(arguments.get("threads", 1))
    engine = str(arguments.get("engine", "auto"))

    def build() -> Any:  # runs in the replica
        from roundexport.runtime.server.app import build as build_application
        from roundexport.runtime.server.models import open_models
        from roundexport.runtime.server.security import read_keys

        keys = read_keys(None)
        settings = ServerSettings(host="0.0.0.0" if keys else "127.0.0.1", keys=keys, rows=ROWS, queue=QUEUE)
        inner = build_application(open_models([package], settings, engine=engine, threads=threads), settings)

        async def named(scope: Any, receive: Any, send: Any) -> None:
            async def with_replica(message: Any) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"x-replica", str(os.getpid()).encode())]
                await send(message)

            await inner(scope, receive, with_replica)

        return named

    options = {
        "num_replicas": int(arguments.get("replicas", 2)), "max_ongoing_requests": ROWS + QUEUE,
        "ray_actor_options": {"num_cpus": threads}, "graceful_shutdown_timeout_s": ServerSettings().drain_s,
    }  # fmt: skip
    return serve.deployment(serve.ingress(build)(), name="roundexport", **options).bind()  # type: ignore[arg-type]


def main() -> None:
    """Serve a package on this machine until told to stop."""
    import ray

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    try:  # a replica that cannot open it is started again and again, and Serve does not say why
        read_package(Path(given.package), check_hashes=False)
    except RoundexportError as error:
        parser.error(str(error))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    cpus = max(os.cpu_count() or 1, given.replicas * given.threads)
    ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": given.port})
        serve.run(application(vars(given)))
        print(f"serving {given.replicas} replicas at http://127.0.0.1:{given.port}; the interface is /v1", flush=True)
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        stop.wait()
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
