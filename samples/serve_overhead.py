"""What HTTP adds to the time to the first token: a scheduler asked directly, and a server asked over a socket, in turn.

    python samples/serve_overhead.py PACKAGE [--rounds 100]

Both are given the same text, new in every round, and stream a few tokens; the server runs in a process of its own, with
the same package and threads.  Client and direct caller share this process, so both pay for the same interpreter.
Printed: medians of both in milliseconds, and the median of the differences of pairs with its quartiles.
"""

from __future__ import annotations

import argparse
import http.client
import json
import queue
import random
import statistics
import time
from typing import Any
from urllib.parse import urlsplit

from roundexport.runtime import Decoder, GenerationSettings, load
from roundexport.runtime.benchmarking.server_process import ServerProcess
from roundexport.runtime.scheduler import Scheduler

WORDS = "the sea a ship went out into storm and sun while old men told of islands far away from every harbor".split()


def directly(scheduler: Scheduler, text: str) -> float:
    """Milliseconds from text to first token; the rest is waited for."""
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    began = time.perf_counter()
    ids = scheduler.decoder.encode(text)
    scheduler.submit(ids, GenerationSettings(max_new_tokens=4, ignore_eos=True), events.put)
    event = events.get()
    took = 1000 * (time.perf_counter() - began)
    while event.finished is None:
        event = events.get()
    return took


def over_http(connection: http.client.HTTPConnection, text: str) -> float:
    """The same of a stream's first event."""
    body = {"prompt": text, "max_tokens": 4, "temperature": 0, "ignore_eos": True, "stream": True}
    data = json.dumps(body)
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", data, {"content-type": "application/json"})
    response = connection.getresponse()
    line = response.readline()
    took = 1000 * (time.perf_counter() - began)
    assert response.status == 200 and line.startswith(b"data: {"), line
    response.read()
    return took


def main() -> None:
    """Time both in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package")
    parser.add_argument("--rounds", type=int, default=100)
    given = parser.parse_args()
    decoder = load(given.package)
    assert isinstance(decoder, Decoder)
    scheduler = Scheduler(decoder)
    with ServerProcess([given.package]) as server:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
        chance, pairs = random.Random(0), []
        for _ in range(given.rounds + 5):
            text = " ".join(chance.choices(WORDS, k=40))
            pairs.append((directly(scheduler, text), over_http(connection, text)))
        connection.close()
    scheduler.close()
    pairs = pairs[5:]
    low, middle, high = statistics.quantiles([there - here for here, there in pairs], n=4)
    print(
        json.dumps(
            {
                "rounds": given.rounds,
                "direct_ms": round(statistics.median(here for here, _ in pairs), 2),
                "http_ms": round(statistics.median(there for _, there in pairs), 2),
                "added_ms": {"p25": round(low, 2), "p50": round(middle, 2), "p75": round(high, 2)},
            }
        )
    )


if __name__ == "__main__":
    main()
