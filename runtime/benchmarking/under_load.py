"""Servers under load: our own, each package in a process of its own, and running ones that speak OpenAI's interface.

    level 1:  A  B      level 2:  A  B  …        every contestant meets a demand before the next demand comes

Prompts are random token ids of the lengths asked for, in turn, new for every request and the same for every contestant;
answers have a fixed length, end-of-sequence ignored.  A server that takes no token ids (OpenVINO Model Server) gets as
many words instead; ``prompt_tokens`` of the report is what servers count.  One request that does not count comes first.
Client and server share the machine: what a client costs is part of what such a machine can do, and the same for all.

What is measured, and how: arrivals.py, load_report.py.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import psutil

from roundexport.environment.threads import choose_threads
from roundexport.errors import RoundexportError, UnsupportedError, UsageError
from roundexport.formats.package import PackageManifest, read_package
from roundexport.runtime.machine import machine_info

from .arrivals import Level, run
from .energy import EnergyMeter
from .load_report import Loaded, LoadReport, Resources
from .memory import tree_rss
from .server_process import ServerProcess
from .stream_client import BUSY, OK, Sample, complete

if TYPE_CHECKING:
    import httpx

_EVERY_S = 0.5  # between looks at memory and energy
_TIMEOUT_S = 600.0
_KEY = "ROUNDEXPORT_API_KEY"
_QUEUE = "roundexport_queue_seconds"
_VOCABULARY = 1000  # ids that any vocabulary has
_WORDS = "the sea a ship went out into storm and sun while old men told of islands far away from every harbor".split()


@dataclass(frozen=True)
class Demand:
    """What servers are asked for.

    Args:
        levels: one after another.
        duration: seconds of measuring per level.
        prompt_lens: tokens of prompts, in turn.
        output_len: tokens of every answer.
        seed: fixes prompts and arrivals.

    Raises:
        UsageError: there is no level, or a value makes no sense.
    """

    levels: tuple[Level, ...]
    duration: float = 30.0
    prompt_lens: tuple[int, ...] = (128,)
    output_len: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.levels:
            raise UsageError("load needs a concurrency or a rate")
        if not 1 <= self.duration <= 86400:
            raise UsageError(f"duration must be from 1 to 86400 seconds, not {self.duration:g}")
        if not self.prompt_lens or min(self.prompt_lens) < 1 or self.output_len < 2:
            raise UsageError("prompt lengths must be at least 1, output length at least 2")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"seed must be from 0 to 2**64 - 1, not {self.seed}")


@dataclass(frozen=True)
class Target:
    """A server that answers.

    Args:
        name: what the report calls it.
        base: its address, with ``/v1`` or what it has instead.
        model: what requests name.
        pid: its process; None if that is not known.
        vocabulary: token ids to draw from; None: it takes no ids but words.
        info: what is known of it.
    """

    name: str
    base: str
    model: str
    pid: int | None
    vocabulary: int | None
    info: dict[str, Any]


def bench_under_load(
    packages: Sequence[str | Path],
    demand: Demand,
    *,
    urls: Sequence[str] = (),
    engine: str = "auto",
    device: str = "CPU",
    threads: int | None = None,
    properties: Mapping[str, str] | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> LoadReport:
    """Time servers under load.

    Args:
        packages: decoder packages, each served in a process of its own.
        demand: what they are asked for.
        urls: bases of servers that run already, as ``http://127.0.0.1:8000/v1``; a key for them is taken from
            ROUNDEXPORT_API_KEY.
        engine: of the packages, see `load`.
        device: of the packages.
        threads: of the packages; None: as `choose_threads` finds.
        properties: of the packages, see `load`.
        on_progress: called with a line of text now and then.

    Raises:
        UsageError: nothing to time, names that are not unique, or lengths beyond a package's max_context.
        UnsupportedError: a package is an encoder, or httpx is missing.
        RoundexportError: a server does not start or does not answer.
    """
    if importlib.util.find_spec("httpx") is None:
        raise UnsupportedError("load comes from httpx, which is not installed: pip install 'roundexport[serve]'")
    if not packages and not urls:
        raise UsageError("nothing to time: give a package or --url")
    manifests = [_fitting(Path(package), demand) for package in packages]
    vocabulary = min((manifest.vocab_size for manifest in manifests), default=_VOCABULARY)
    chosen = choose_threads(threads)
    meter, told = EnergyMeter(), dict(properties or {})
    with ExitStack() as stack:
        targets = []
        for package, name in zip(packages, _names(packages), strict=True):
            on_progress(f"opening {name}; {chosen}")
            options = ["--engine", engine, "--device", device, "--threads", str(chosen.count)]
            options += [word for one in told.items() for word in ("--property", "=".join(one))]
            server = stack.enter_context(ServerProcess([f"served={package}"], *options))
            targets.append(Target(name, f"{server.url}/v1", "served", server.pid, vocabulary, {}))
        targets += [Target(url, url.rstrip("/"), "", _listener(url), vocabulary, {}) for url in urls]
        if len({target.name for target in targets}) < len(targets):
            raise UsageError(f"contestants need different names, got {[target.name for target in targets]}")
        levels, known = asyncio.run(_all(targets, demand, meter, on_progress))
    machine = {**machine_info(), "energy": meter.missing or "RAPL, all sockets"}
    settings = {
        "prompt_lens": list(demand.prompt_lens), "output_len": demand.output_len, "duration": demand.duration,
        "seed": demand.seed, "threads": chosen.count, "device": device, "properties": told,
    }  # fmt: skip
    return LoadReport(machine, settings, {target.name: target.info for target in known}, tuple(levels))


async def _all(
    targets: Sequence[Target], demand: Demand, meter: EnergyMeter, tell: Callable[[str], None]
) -> tuple[list[Loaded], list[Target]]:
    import httpx

    key = os.environ.get(_KEY, "").split()
    headers = {"authorization": f"Bearer {key[0]}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    found = []
    async with httpx.AsyncClient(timeout=_TIMEOUT_S, limits=limits, headers=headers, trust_env=False) as client:
        known = [await _introduced(client, target, demand) for target in targets]
        for number, level in enumerate(demand.levels):
            for target in known:
                tell(f"{target.name}: {level} for {demand.duration:g} s")
                found.append(await _loaded(client, target, demand, number, meter))
    return found, known


async def _loaded(client: httpx.AsyncClient, target: Target, demand: Demand, number: int, meter: EnergyMeter) -> Loaded:
    level = demand.levels[number]

    async def ask(request: int, due: float) -> Sample:
        return await complete(client, f"{target.base}/completions", _body(target, demand, (number, request)), due)

    before = await _waits(client, target)
    async with _watched(target, meter) as watch:
        window = await run(level, ask, demand.duration, demand.seed)
    after = await _waits(client, target)
    requests = 0 if before is None or after is None else after[1] - before[1]
    queue = 1000 * (after[0] - before[0]) / requests if before and after and requests else None
    joules = watch.between(window.start, window.end)
    return Loaded(target.name, level, window, Resources(watch.rss_max, joules, queue))


class _Watch:
    """Memory and energy, looked at every half second."""

    def __init__(self, pid: int | None, meter: EnergyMeter) -> None:
        self._pid, self._meter = pid, meter
        self._energy: list[tuple[float, float]] = []
        self.rss_max: int | None = None

    def look(self) -> None:
        if self._pid is not None:
            self.rss_max = max(self.rss_max or 0, tree_rss(self._pid))
        joules = self._meter.joules()
        if joules is not None:
            self._energy.append((time.perf_counter(), joules))

    def between(self, start: float, end: float) -> float | None:
        """Joules between two moments, by a line through the looks."""
        if len(self._energy) < 2:
            return None
        times, joules = zip(*self._energy, strict=True)
        first, last = np.interp([start, end], times, joules)
        return float(last - first)


@asynccontextmanager
async def _watched(target: Target, meter: EnergyMeter) -> AsyncIterator[_Watch]:
    watch = _Watch(target.pid, meter)

    async def look() -> None:
        while True:
            await asyncio.to_thread(watch.look)
            await asyncio.sleep(_EVERY_S)

    looking = asyncio.ensure_future(look())
    try:
        yield watch
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        watch.look()


def _body(target: Target, demand: Demand, numbers: Sequence[int]) -> dict[str, Any]:
    """A request; ``numbers`` of level and request make its prompt."""
    random = np.random.default_rng([demand.seed, *numbers])
    length = demand.prompt_lens[numbers[-1] % len(demand.prompt_lens)]
    prompt: Any
    if target.vocabulary is None:
        prompt = " ".join(random.choice(_WORDS, length).tolist())
    else:
        prompt = random.integers(0, target.vocabulary, length).tolist()
    return {
        "model": target.model, "prompt": prompt, "max_tokens": demand.output_len, "ignore_eos": True, "temperature": 0,
    }  # fmt: skip


async def _introduced(client: httpx.AsyncClient, target: Target, demand: Demand) -> Target:
    """A server with its model's name, what it says of itself, and the form in which it takes prompts.

    Raises:
        RoundexportError: it does not answer.
    """
    import httpx

    try:
        listed = (await client.get(f"{target.base}/models")).json()
        model = target.model or listed["data"][0]["id"]
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise RoundexportError(
            f"{target.name}: {target.base}/models does not list a model ({type(error).__name__}: {error}); "
            "give the base of OpenAI's interface, as http://127.0.0.1:8000/v1"
        ) from error
    info = {"url": target.base, "model": model, "engine": await _engine(client, f"{target.base}/models/{model}")}
    target = replace(target, model=model, info=info)
    said = None
    for form in (target, replace(target, vocabulary=None)):
        body = _body(form, demand, (len(demand.levels), 0))
        sample = await complete(client, f"{target.base}/completions", body, time.perf_counter())
        if sample.whole or sample.status == BUSY:
            return form
        said = said or sample.error
    raise RoundexportError(f"{target.name} does not answer {target.base}/completions: {said}")


async def _engine(client: httpx.AsyncClient, url: str) -> Any:
    """The engine that a server of ours names on a model's card; None for others, whatever they answer here."""
    import httpx

    try:
        return (await client.get(url)).json()["card"]["engine"]
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        return None


async def _waits(client: httpx.AsyncClient, target: Target) -> tuple[float, int] | None:
    """Seconds that answers have waited in a server of ours, all together, and how many; None for others."""
    import httpx

    try:
        found = await client.get(f"{target.base.removesuffix('/v1')}/metrics")
    except httpx.HTTPError:
        return None
    if found.status_code != OK:
        return None
    sums = dict.fromkeys(("sum", "count"), 0.0)
    for line in found.text.splitlines():
        for kind in sums:
            if line.startswith(f"{_QUEUE}_{kind}{{"):
                sums[kind] += float(line.rpartition(" ")[2])
    return (sums["sum"], int(sums["count"])) if sums["count"] else (0.0, 0)


def _fitting(package: Path, demand: Demand) -> PackageManifest:
    manifest = read_package(package, check_hashes=False)
    if manifest.task != "generate":
        raise UnsupportedError(f"{package} is an encoder; load is put on packages that write text")
    if (longest := max(demand.prompt_lens) + demand.output_len) > manifest.max_context:
        raise UsageError(f"{longest} tokens were asked for, but max_context of {package} is {manifest.max_context}")
    return manifest


def _names(packages: Sequence[str | Path]) -> list[str]:
    names = [Path(package).name for package in packages]
    return names if len(set(names)) == len(names) else [str(package) for package in packages]


def _listener(url: str) -> int | None:
    """The process on this machine that listens at an address; None if there is none that may be known."""
    port = urlsplit(url).port
    try:
        open_ports = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return None
    if urlsplit(url).hostname not in ("127.0.0.1", "::1", "localhost") or port is None:
        return None
    return next((c.pid for c in open_ports if c.status == psutil.CONN_LISTEN and c.laddr.port == port), None)
