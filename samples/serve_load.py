"""A server under load: many streams at once, some of whose clients vanish or send nonsense; nothing may stick or grow.

    python samples/serve_load.py PACKAGE [--streams 32] [--seconds 60]

Starts `roundexport serve` by itself.  Each of the clients, one request after another: 10 % of requests are left in the
middle of their stream, 5 % have a malformed body, half of the rest is streamed.  Checked: every stream that was not
left ends with [DONE] and has its whole usage; malformed bodies get 4xx in OpenAI's form; 429 is taken as it is meant;
afterwards nothing runs or waits; memory after warm-up (the first fifth of the time, at least 10 s) stays within 5 %;
and the server ends within 5 s of SIGTERM.  The last line is one JSON document; exit code 1 where something failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import httpx
import psutil

VANISHING, MALFORMED = 0.10, 0.05
NONSENSE = [
    b"", b"{", b"[]", b'{"messages": 5}', b'{"messages": []}', b'{"messages": [{"role": "user", "content": "\xff"}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "n": 0}', b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', b'{"hello": 1}',
]  # fmt: skip
WORDS = "the sea a ship went out into storm and sun while old men told of islands far away from every harbor".split()


class Load:
    """What the clients saw."""

    def __init__(self, url: str, end: float, chat: bool) -> None:
        self.end, self.chat = end, chat
        self.url = f"{url}/v1/{'chat/completions' if chat else 'completions'}"
        self.seen: Counter[str] = Counter()
        self.faults: list[str] = []
        self.first_ms: list[float] = []
        self.tokens = 0

    async def one_client(self, number: int) -> None:
        """Requests until the time is over."""
        chance = random.Random(number)
        async with httpx.AsyncClient(timeout=120) as client:
            while time.monotonic() < self.end:
                try:
                    await self._request(client, chance)
                except httpx.HTTPError as error:
                    self.faults.append(f"{type(error).__name__}: {error}")

    async def _request(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        draw = chance.random()
        if draw < MALFORMED:
            await self._malformed(client, chance)
            return
        text = " ".join(chance.choices(WORDS, k=chance.randint(4, 60)))
        asked = {"messages": [{"role": "user", "content": text}]} if self.chat else {"prompt": text}
        body: dict[str, object] = {**asked, "max_tokens": chance.randint(8, 64), "ignore_eos": True}
        if draw < MALFORMED + VANISHING or chance.random() < 0.5:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            await self._stream(client, body, chance.randint(1, 8) if draw < MALFORMED + VANISHING else None)
            return
        found = await client.post(self.url, json=body)
        if not await self._busy(found) and found.status_code == 200:
            used = found.json()["usage"]["completion_tokens"]
            self._whole(used, body["max_tokens"], "whole")
        elif found.status_code not in (200, 429):
            self.faults.append(f"status {found.status_code}: {found.text[:200]}")

    async def _malformed(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        headers = {"content-type": "application/json"}
        found = await client.post(self.url, content=chance.choice(NONSENSE), headers=headers)
        self.seen["malformed"] += 1
        if found.status_code != 400 or "error" not in found.json():
            self.faults.append(f"malformed got {found.status_code}: {found.text[:200]}")

    async def _stream(self, client: httpx.AsyncClient, body: dict[str, object], leave_after: int | None) -> None:
        began, events, last = time.perf_counter(), 0, ""
        used: int | None = None
        async with client.stream("POST", self.url, json=body) as found:
            if await self._busy(found):
                return
            async for line in found.aiter_lines():
                if not line.startswith("data: "):
                    continue
                events, last = events + 1, line
                if events == 1:
                    self.first_ms.append(1000 * (time.perf_counter() - began))
                if '"usage":{' in line:
                    used = json.loads(line[6:])["usage"]["completion_tokens"]
                if leave_after is not None and events >= leave_after:
                    self.seen["vanished"] += 1
                    return
        if last != "data: [DONE]":
            self.faults.append(f"a stream ended with {last[:200]}")
        self._whole(used, body["max_tokens"], "streamed")

    def _whole(self, used: int | None, wanted: object, kind: str) -> None:
        self.seen[kind] += 1
        self.tokens += used or 0
        if used != wanted:
            self.faults.append(f"{kind}: {used} tokens of {wanted}")

    async def _busy(self, found: httpx.Response) -> bool:
        if found.status_code != 429:
            return False
        self.seen["429"] += 1
        await asyncio.sleep(min(int(found.headers["retry-after"]), 2))
        return True


def main() -> None:
    """Start a server, load it, look at it, stop it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()
    environment = {**os.environ, "ROUNDEXPORT_API_KEY": ""}
    # With a small cache, which is full after a moment, so that memory tells of leaks and not of what is kept.
    command = [sys.executable, "-m", "roundexport.cli.app", "serve", f"load={given.package}"]
    command += ["--port", "0", "--cache-tokens", "8192"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://\S+(?=;)", line)
        if found is None:
            sys.exit(line + process.stderr.read())
        sink = asyncio.run(_load(process, found[0], given.streams, given.seconds))
    print(json.dumps(sink))
    sys.exit(1 if sink["faults"] else 0)


async def _load(process: subprocess.Popen[str], url: str, streams: int, seconds: float) -> dict[str, object]:
    reader = asyncio.create_task(asyncio.to_thread(process.stderr.read))  # type: ignore[union-attr]  # its log
    async with httpx.AsyncClient() as client:
        chat = (await client.get(f"{url}/v1/models/load")).json()["card"]["chat"]
    load = Load(url, time.monotonic() + seconds, chat)
    memory: list[tuple[float, int]] = []
    work = asyncio.gather(*(load.one_client(number) for number in range(streams)))
    began = time.monotonic()
    while not work.done():
        memory.append((time.monotonic() - began, psutil.Process(process.pid).memory_info().rss))
        await asyncio.wait({work}, timeout=1)
    await work
    warm = [rss for at, rss in memory if max(10.0, seconds / 5) <= at <= seconds]
    growth = sum(warm[-5:]) / sum(warm[:5]) - 1 if len(warm) >= 10 else None
    if growth is not None and growth > 0.05:
        load.faults.append(f"memory grew by {growth:.1%}")
    await asyncio.sleep(1)
    async with httpx.AsyncClient() as client:
        stats = (await client.get(f"{url}/v1/stats")).json()["models"]["load"]
    if stats["load"]["waiting"] or stats["load"]["writing"]:
        load.faults.append(f"something sticks: {stats['load']}")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code = await asyncio.to_thread(process.wait, 30)
    if code != 0 or time.monotonic() - began > 5:
        load.faults.append(f"it ended with {code} after {time.monotonic() - began:.1f} s")
    log = await reader
    unexpected = [line for line in log.splitlines() if "ERROR" in line or "Traceback" in line]
    load.faults += unexpected[:5]
    first = sorted(load.first_ms)
    return {
        "seconds": seconds, "streams": streams, "seen": dict(load.seen),
        "tokens_per_s": round(load.tokens / seconds, 1),
        "first_event_ms": {q: round(first[int(len(first) * q / 100)], 1) for q in (50, 90)} if first else None,
        "rss_mib": [round(rss / 2**20) for rss in (warm[:1] + warm[-1:])],
        "rss_growth": None if growth is None else round(growth, 4),
        "counts": stats["counts"], "faults": load.faults[:20],
    }  # fmt: skip


if __name__ == "__main__":
    main()
