"""Timing packages against each other: each in its own process, all alive at once, asked in turn.

    round 1:  A 128  B 128 | A 512  B 512     round 2:  A 128  B 128 | …

A machine's speed drifts within minutes, so figures from separate runs cannot be compared; asked in turn, contestants
meet the same drift, and ratios are taken inside each round.  Prompts are random token ids of exact length, new ones
every round and the same for everyone, so that no prefix cache helps; one warm-up per shape is thrown away; output
length is fixed, end-of-sequence ignored, outputs are hashed.

    ttft_ms      request to first token, tokenization not included      prefill_tps  = prompt_len / ttft
    tpot_ms      (last − first token) / (output_len − 1)                 decode_tps   = rows / tpot
    itl_*_ms     percentiles of the gaps between tokens, over all rounds; blank where fewer gaps than would show one
    kl           nats, what the package's own record of `verify` says; blank without one
    mbu          bytes a decode step reads · decode_tps / measured read bandwidth (machine.py)
    joules_per_token  of the sockets, idle ones included, over the tokens written (energy.py); blank where not readable
    peak_rss_mib largest resident set of the contestant's process tree, loading included

A contestant need not be a package: any command that speaks the protocol of worker.py takes part.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from roundexport.errors import RoundexportError, UsageError
from roundexport.runtime.loading import opens
from roundexport.runtime.machine import machine_info, read_bandwidth
from roundexport.threads import choose_threads

from .energy import EnergyMeter, per_token
from .memory import tree_rss
from .report import BenchReport, Opened, Run

OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class Contestant:
    """Something to time: a command that speaks the protocol of worker.py.

    Args:
        name: what the report calls it.
        command: program and arguments.
    """

    name: str
    command: tuple[str, ...]


def bench(  # noqa: PLR0913  (the parameters are the verb's flags)
    packages: str | Path | Contestant | Sequence[str | Path | Contestant],
    *,
    prompt_lens: Sequence[int] = (128, 512),
    output_len: int = 64,
    rounds: int = 5,
    batch_sizes: Sequence[int] | None = None,
    engine: str = "auto",
    device: str = "CPU",
    threads: int | None = None,
    precise: bool = False,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> BenchReport:
    """Time packages, and whatever else takes part, in turn.

    Args:
        packages: package folders and contestants; the first is what ratios refer to.
        prompt_lens: tokens per prompt (decoders) or text (encoders).
        output_len: tokens written per prompt.
        rounds: measurements per shape and contestant.
        batch_sizes: texts per call (encoders) or prompts answered together (decoders); 1 gives the latency.
        engine: ``auto``, or names of engines, comma-separated: every package takes part with each that opens it.
        device: device of the packages.
        threads: worker threads of the packages; None: as `choose_threads` finds.
        precise: open the packages in float32 throughout.
        seed: fixes the prompts.
        on_progress: called with a line of text now and then.

    Raises:
        UsageError: nothing to time, a shape that does not fit, or decoders and encoders mixed.
        RoundexportError: a contestant failed; the text has its own error.
    """
    chosen = choose_threads(threads)
    threads = chosen.count
    given = [packages] if isinstance(packages, str | Path | Contestant) else list(packages)
    options = {"device": device, "threads": threads, "precise": precise}
    contestants = _named(given, engine.split(","), options)
    if rounds < 1 or output_len < 2 or min(*prompt_lens, *(batch_sizes or (1,))) < 1:
        raise UsageError("rounds, prompt_lens and batch_sizes must be at least 1, output_len at least 2")
    if not 0 <= seed < 2**64:
        raise UsageError(f"seed must be from 0 to 2**64 - 1, not {seed}")
    tell = on_progress or (lambda _: None)
    tell(f"{chosen}; measuring memory bandwidth")
    machine = {**machine_info(), "read_bandwidth_gbps": round(read_bandwidth(threads) / 1e9, 2)}
    meter = EnergyMeter()
    machine["energy"] = meter.missing or "RAPL, all sockets"
    workers: list[_Worker] = []
    try:
        for contestant in contestants:
            tell(f"loading {contestant.name}")
            workers.append(_Worker(contestant, threads))
        shapes = _shapes(workers, prompt_lens, output_len, batch_sizes)
        first: dict[str, Run] = {}
        for worker in workers:
            for shape in shapes:
                run = _measure(worker, shape, 0, seed, meter)
                first.setdefault(worker.name, run)
        runs = []
        for number in range(1, rounds + 1):
            tell(f"round {number} of {rounds}")
            runs += [_measure(worker, shape, number, seed, meter) for shape in shapes for worker in workers]
        opened = tuple(worker.opened(first[worker.name]) for worker in workers)
    finally:
        for worker in workers:
            worker.close()
    settings = {"rounds": rounds, "seed": seed, "threads": threads, "device": device, "precise": precise}
    return BenchReport(machine, settings, opened, tuple(runs))


def package_contestant(package: str | Path, name: str | None = None, **options: Any) -> Contestant:
    """A package as a contestant; ``options`` are the parameters of `load`."""
    arguments = json.dumps({"package": str(package), **options})
    # -P keeps the current folder off the path: a folder called runtime or kernels there must not be found.
    return Contestant(name or Path(package).name, (sys.executable, "-P", "-m", f"{__package__}.worker", arguments))


def _named(
    given: Sequence[str | Path | Contestant], engines: Sequence[str], options: dict[str, Any]
) -> list[Contestant]:
    if not given:
        raise UsageError("nothing to time: give at least one package")
    names = [Path(item).name for item in given if not isinstance(item, Contestant)]
    unique = len(set(names)) == len(names)
    found = []
    for item in given:
        if isinstance(item, Contestant):
            found.append(item)
            continue
        name = Path(item).name if unique else str(item)
        chosen = [engine for engine in engines if engine == "auto" or opens(engine, item)]
        if not chosen:
            raise UsageError(f"{item}: none of the engines {', '.join(engines)} opens this package")
        for engine in chosen:
            label = name if len(engines) == 1 else f"{name} · {engine}"
            found.append(package_contestant(item, label, engine=engine, **options))
    if len({contestant.name for contestant in found}) < len(found):
        raise UsageError(f"contestants need different names, got {[contestant.name for contestant in found]}")
    return found


def _shapes(
    workers: Sequence[_Worker], prompt_lens: Sequence[int], output_len: int, batch_sizes: Sequence[int] | None
) -> list[dict[str, int]]:
    tasks = {worker.task for worker in workers}
    if len(tasks) > 1:
        raise UsageError(
            f"decoders and encoders cannot be timed against each other: {[(w.name, w.task) for w in workers]}"
        )
    decoder = tasks == {"generate"}
    limit = min(worker.max_context for worker in workers)
    longest = max(prompt_lens) + (output_len if decoder else 0)
    if longest > limit:
        raise UsageError(
            f"{longest} tokens were asked for, the shortest max_context here is {limit}; give shorter prompts"
        )
    if decoder:
        together = ({} if size == 1 else {"batch_size": size} for size in batch_sizes or (1,))
        return [{"prompt_len": n, "output_len": output_len, **size} for size in together for n in prompt_lens]
    return [{"text_len": n, "batch_size": size} for n in prompt_lens for size in batch_sizes or (1, 8)]


def _measure(worker: _Worker, shape: dict[str, int], number: int, seed: int, meter: EnergyMeter) -> Run:
    """One measurement; ``number`` 0 is the warm-up."""
    random = np.random.default_rng([seed, number, *shape.values()])
    if worker.task == "generate":
        rows = shape.get("batch_size", 1)
        prompts = random.integers(0, worker.vocab_size, (rows, shape["prompt_len"])).tolist()
        request = {"do": "generate", "prompt": prompts[0], "output_len": shape["output_len"]}
        before = meter.joules()
        reply = worker.ask(request if rows == 1 else {**request, "others": prompts[1:]})
        spent = per_token(before, meter.joules(), rows * shape["output_len"])
        return _decoder_run(worker.name, number, shape, reply, spent)
    batch = random.integers(0, worker.vocab_size, (shape["batch_size"], shape["text_len"])).tolist()
    reply = worker.ask({"do": "embed", "batch": batch})
    metrics = {"latency_ms": reply["ms"], "texts_per_s": shape["batch_size"] / reply["ms"] * 1e3}
    return Run(worker.name, number, shape, metrics, reply["sha256"])


def _decoder_run(name: str, number: int, shape: dict[str, int], reply: dict[str, Any], joules: float | None) -> Run:
    if len(reply["tokens"]) != shape["output_len"]:
        raise RoundexportError(f"{name} wrote {len(reply['tokens'])} tokens, {shape['output_len']} were asked for")
    first, gaps = reply["first_ms"], reply["step_ms"]
    tpot, rows = sum(gaps) / len(gaps), shape.get("batch_size", 1)
    metrics = {
        "ttft_ms": first,
        "tpot_ms": tpot,
        "prefill_tps": rows * shape["prompt_len"] / first * 1e3,
        "decode_tps": rows * 1e3 / tpot,
        "e2e_ms": first + sum(gaps),
    }
    if joules is not None:
        metrics["joules_per_token"] = joules
    digest = hashlib.sha256(np.array(reply["tokens"], np.int64).tobytes()).hexdigest()
    return Run(name, number, shape, metrics, digest, tuple(gaps))


class _Worker:
    """A contestant's process."""

    def __init__(self, contestant: Contestant, threads: int) -> None:
        self.name = contestant.name
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            contestant.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        self._peak = 0
        try:
            reply = self.ask({"do": "load"})
            self.loaded_rss = tree_rss(self._process.pid)
        except BaseException:
            self.close()
            raise
        self.task: str = reply["task"]
        self.vocab_size: int = reply["vocab_size"]
        self.max_context: int = reply["max_context"]
        self._reply = reply

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request.

        Raises:
            RoundexportError: the contestant reports an error, or died.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died; the missing reply below tells why
        while (line := self._process.stdout.readline()) and not line.startswith("{"):
            pass  # a library's greeting while it is imported
        self._peak = max(self._peak, tree_rss(self._process.pid, peak=True))
        if not line:
            self._errors.seek(0)
            tail = self._errors.read()[-2000:].strip()
            raise RoundexportError(
                f"contestant {self.name!r} ended with code {self._process.wait()}: {tail or 'no message'}"
            )
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise RoundexportError(f"contestant {self.name!r}: {reply['error']}")
        return reply

    def opened(self, first: Run) -> Opened:
        """What is known of it at the end; ``first`` is its very first measurement."""
        return Opened(
            name=self.name,
            task=self.task,
            load_ms=self._reply["load_ms"],
            first_inference_ms=first.metrics["ttft_ms" if self.task == "generate" else "latency_ms"],
            loaded_rss_mib=self.loaded_rss / 2**20,
            peak_rss_mib=self._peak / 2**20,
            weight_bytes=self._reply.get("weight_bytes"),
            kl=self._reply.get("kl"),
            info=self._reply["info"],
        )

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write('{"do": "quit"}\n')
            self._process.stdin.close()
        except OSError:
            pass  # it died already
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()
