"""A server under load: many streams at once, some of whose clients vanish or send nonsense; nothing may stick or grow.

    python samples/serve_load.py PACKAGE [--streams 32] [--seconds 300]

Starts `roundexport serve` by itself.  Each of the clients, one request after another: 10 % of requests are left in the
middle of their stream, 5 % have a malformed body, half of the rest is streamed.  Checked, and told one by one:

    every answer is whole         it has all tokens that were asked for; a stream that was not left ends with [DONE]
    nonsense is refused           with 400 in OpenAI's form
    nothing is stuck              no request takes two minutes; afterwards nothing runs or waits
    memory is flat                mean of the last tenth of the time within 5 % of that of the first tenth after warm-up
                                  (the first fifth of the time, at least 10 s), and never more than 5 % above it
    it ends when told to          with code 0, within 5 s of SIGTERM, and without an error in its log

429 is taken as it is meant.  The last line is one JSON document; exit code 1 where something failed.  How fast a server
is under load is another question: `roundexport bench PACKAGE --concurrency 1,8,32`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter, defaultdict
from statistics import mean

import httpx

from roundexport.runtime.benchmarking.memory import tree_rss
from roundexport.runtime.benchmarking.server_process import ServerProcess

VANISHING, MALFORMED = 0.10, 0.05
WHOLE, NONSENSE_REFUSED = "every answer is whole", "nonsense is refused"
NOTHING_STUCK, FLAT, ENDS = "nothing is stuck", "memory is flat", "it ends when told to"
CHECKS = (WHOLE, NONSENSE_REFUSED, NOTHING_STUCK, FLAT, ENDS)
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
        self.faults: defaultdict[str, list[str]] = defaultdict(list)
        self.first_ms: list[float] = []
        self.tokens = 0

    async def one_client(self, number: int) -> None:
        """Requests until the time is over."""
        chance = random.Random(number)
        async with httpx.AsyncClient(timeout=120) as client:
            while time.monotonic() < self.end:
                try:
                    await self._request(client, chance)
                except httpx.TimeoutException as error:
                    self.faults[NOTHING_STUCK].append(f"{type(error).__name__}: {error}")
                except httpx.HTTPError as error:
                    self.faults[WHOLE].append(f"{type(error).__name__}: {error}")

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
            self.faults[WHOLE].append(f"status {found.status_code}: {found.text[:200]}")

    async def _malformed(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        headers = {"content-type": "application/json"}
        found = await client.post(self.url, content=chance.choice(NONSENSE), headers=headers)
        self.seen["malformed"] += 1
        if found.status_code != 400 or "error" not in found.json():
            self.faults[NONSENSE_REFUSED].append(f"malformed got {found.status_code}: {found.text[:200]}")

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
            self.faults[WHOLE].append(f"a stream ended with {last[:200]}")
        self._whole(used, body["max_tokens"], "streamed")

    def _whole(self, used: int | None, wanted: object, kind: str) -> None:
        self.seen[kind] += 1
        self.tokens += used or 0
        if used != wanted:
            self.faults[WHOLE].append(f"{kind}: {used} tokens of {wanted}")

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
    parser.add_argument("--seconds", type=float, default=300)
    given = parser.parse_args()
    # With a small cache, which is full after a moment, so that memory tells of leaks and not of what is kept.
    with ServerProcess([f"load={given.package}"], "--cache-tokens", "8192") as server:
        found = asyncio.run(_load(server, given.streams, given.seconds))
    for check in CHECKS:
        wrong = found["faults"].get(check, [])
        unknown = check == FLAT and found["rss_growth"] is None
        verdict = "FAILED" if wrong else "too short a run to tell" if unknown else "held"
        print(f"{verdict}  {check}{': ' + wrong[0] if wrong else ''}", file=sys.stderr)
    print(json.dumps(found))
    sys.exit(1 if found["faults"] else 0)


async def _load(server: ServerProcess, streams: int, seconds: float) -> dict[str, object]:
    async with httpx.AsyncClient() as client:
        chat = (await client.get(f"{server.url}/v1/models/load")).json()["card"]["chat"]
    load = Load(server.url, time.monotonic() + seconds, chat)
    memory: list[tuple[float, int]] = []
    work = asyncio.gather(*(load.one_client(number) for number in range(streams)))
    began = time.monotonic()
    while not work.done():
        memory.append((time.monotonic() - began, tree_rss(server.pid)))
        await asyncio.wait({work}, timeout=1)
    await work
    warm = [rss for at, rss in memory if max(10.0, seconds / 5) <= at <= seconds]
    growth, highest = _growth(warm)
    if max(growth or 0.0, highest or 0.0) > 0.05 or (growth or 0.0) < -0.05:
        load.faults[FLAT].append(f"at the end {growth:+.1%}, at most {highest:+.1%}")
    await asyncio.sleep(1)
    async with httpx.AsyncClient() as client:
        stats = (await client.get(f"{server.url}/v1/stats")).json()["models"]["load"]
    if stats["load"]["waiting"] or stats["load"]["writing"]:
        load.faults[NOTHING_STUCK].append(f"afterwards there are {stats['load']}")
    began = time.monotonic()
    code = await asyncio.to_thread(server.stop)
    if code != 0 or time.monotonic() - began > 5:
        load.faults[ENDS].append(f"it ended with {code} after {time.monotonic() - began:.1f} s")
    load.faults[ENDS] += [line.strip() for line in server.log if "ERROR" in line or "Traceback" in line][:5]
    first = sorted(load.first_ms)
    return {
        "seconds": seconds, "streams": streams, "seen": dict(load.seen),
        "tokens_per_s": round(load.tokens / seconds, 1),
        "first_event_ms": {q: round(first[int(len(first) * q / 100)], 1) for q in (50, 90)} if first else None,
        "rss_mib": [round(rss / 2**20) for rss in (warm[:1] + warm[-1:])],
        "rss_growth": growth, "rss_highest": highest, "counts": stats["counts"],
        "faults": {check: told[:20] for check, told in load.faults.items() if told},
    }  # fmt: skip


def _growth(warm: list[int]) -> tuple[float | None, float | None]:
    """Memory at the end and at most, over that at the beginning; None where the run was too short to tell."""
    part = len(warm) // 8  # the last tenth of all, when the first fifth is left out
    if part < 2:
        return None, None
    return round(mean(warm[-part:]) / mean(warm[:part]) - 1, 4), round(max(warm) / mean(warm[:part]) - 1, 4)


if __name__ == "__main__":
    main()
