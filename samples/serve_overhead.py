"""What serving adds: to the start, and to the time to the first token.

    python samples/serve_overhead.py PACKAGE [--rounds 100] [--starts 5]

Start: seconds from starting `roundexport serve` to the first answer of ``/health``, against seconds that opening the
same package takes in a process of its own, in turn, and what `import roundexport.runtime` takes there; beside them the
processor seconds of each, which a busy machine changes little.  First token: a scheduler asked directly, and a server
asked over a socket, in turn.  Both are given the same text, new in every round, and stream a few tokens; the server
runs in a process of its own, with the same package and threads.  Client and direct caller share this process, so both
pay for the same interpreter.  Printed: medians, in seconds and in milliseconds, and the median of the differences of
pairs with its quartiles.
"""

from __future__ import annotations

import argparse
import http.client
import json
import queue
import random
import statistics
import subprocess
import sys
import time
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil

from roundexport.runtime import Decoder, GenerationSettings, load
from roundexport.runtime.benchmarking.server_process import ServerProcess
from roundexport.runtime.scheduler import Scheduler

WORDS = "the sea a ship went out into storm and sun while old men told of islands far away from every harbor".split()

OPENING = """
import sys, time
def now(): return time.perf_counter(), time.process_time()
began = now()
import roundexport.runtime
imported = now()
roundexport.runtime.load(sys.argv[1])
opened = now()
print(*(b - a for times in ((began, imported), (imported, opened)) for a, b in zip(*times)))
"""
Times = tuple[float, float]  # seconds, and processor seconds


def opening(package: str) -> tuple[Times, Times]:
    """What the import and the opening of a package take in a new process."""
    command = [sys.executable, "-P", "-c", OPENING, package]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    imported, imported_cpu, opened, opened_cpu = map(float, said)
    return (imported, imported_cpu), (opened, opened_cpu)


def healthy(package: str) -> Times:
    """From starting a server to its first answer of ``/health``."""
    began = time.perf_counter()
    with ServerProcess([package]) as server, urlopen(f"{server.url}/health") as answer:
        took, used = time.perf_counter() - began, psutil.Process(server.pid).cpu_times()
        assert answer.status == 200
    return took, used.user + used.system


def starts(package: str, count: int) -> dict[str, Any]:
    """Medians of all three, and of what `serve` takes beyond opening the package."""
    found = [(*opening(package), healthy(package)) for _ in range(count)]
    told: dict[str, Any] = {"starts": count}
    for place, unit in enumerate(("s", "cpu_s")):
        rows = [[times[place] for times in row] for row in found]
        for name, values in zip(("import", "load", "health"), zip(*rows, strict=True), strict=True):
            told[f"{name}_{unit}"] = round(statistics.median(values), 3)
        told[f"health_beyond_load_{unit}"] = round(statistics.median(row[2] - row[1] for row in rows), 3)
    return told


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
    """Time both in turn, the starts first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--starts", type=int, default=5)
    given = parser.parse_args()
    print(json.dumps(starts(given.package, given.starts)))
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
