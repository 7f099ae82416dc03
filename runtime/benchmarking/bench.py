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
    cold_load_ms loading with the contestant's files dropped from the page cache; load_ms: with them in it
    first_inference_ms, peak_rss_mib (largest resident set of the process tree): of the cold start

The cold start is a run of its own, before the timed one and with nobody else there: it loads, answers each shape once
and ends.  A contestant need not be a package: any command that speaks the protocol of worker.py takes part
(contestants.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from roundexport.environment.threads import choose_threads
from roundexport.errors import RoundexportError, UsageError
from roundexport.runtime.engine_table import keep
from roundexport.runtime.machine import machine_info, read_bandwidth

from .contestants import Contestant, Rivals, named_contestants
from .energy import EnergyMeter, per_token
from .engine_rows import engine_rows
from .process import ContestantProcess, forget
from .profile import PHASES, Profile
from .profiling import refuse_opened, refuse_unprofiled
from .report import BenchReport, Opened, Run

OnProgress = Callable[[str], None]
_USUAL_LENS = (128, 512)


@dataclass(frozen=True)
class _FirstRun:
    """A contestant alone, from the disk: times in ms (loading is None where it could not be cold), memory in bytes."""

    load_ms: float | None
    first_ms: float
    loaded_rss: int
    peak_rss: int


def bench(  # noqa: PLR0913  (the parameters are the verb's flags)
    packages: str | Path | Contestant | Sequence[str | Path | Contestant],
    *,
    prompt_lens: Sequence[int] | None = None,
    output_len: int = 64,
    rounds: int = 5,
    batch_sizes: Sequence[int] | None = None,
    engine: str | None = None,
    model: str | Path | None = None,
    gguf: str | Path | None = None,
    device: str = "CPU",
    threads: int | None = None,
    precise: bool = False,
    properties: Mapping[str, str] | None = None,
    cold: bool = True,
    seed: int = 0,
    profile: bool = False,
    on_progress: OnProgress | None = None,
) -> BenchReport:
    """Time packages, and whatever else takes part, in turn.

    Args:
        packages: package folders and contestants; the first is what ratios refer to.
        prompt_lens: tokens per prompt (decoders) or text (encoders); None: 128 and 512, or what fits.
        output_len: tokens written per prompt.
        rounds: measurements per shape and contestant.
        batch_sizes: texts per call (encoders) or prompts answered together (decoders); 1 gives the latency.
        engine: names of engines, comma-separated: every package takes part with each that opens it, and so do
            ``torch``, ``torch-bfloat16`` and ``llama.cpp``.  ``auto`` alone: every engine that is installed, and what
            `load` chooses by on this machine is measured anew and kept.  None: each package as `load` opens it.
        model: the float model, for ``torch``; None: where the first package says that it came from.
        gguf: the file for ``llama.cpp``.
        device: device of the packages.
        threads: worker threads of the packages; None: as `choose_threads` finds.
        precise: open the packages in float32 throughout.
        properties: what OpenVINO's plugin is told, in its own names; packages in other engines refuse them.
        cold: start every contestant once beforehand, alone and from the disk, for cold load, first inference and
            memory; without it the last two are those of the start that is timed.
        seed: fixes the prompts.
        profile: afterwards, in runs of their own, what every operator takes; of decoders in engines with sessions.
        on_progress: called with a line of text now and then.

    Raises:
        UsageError: nothing to time, a shape that does not fit, or decoders and encoders mixed.
        RoundexportError: a contestant failed; the text has its own error.
    """
    chosen = choose_threads(threads)
    threads = chosen.count
    given = [packages] if isinstance(packages, str | Path | Contestant) else list(packages)
    told = dict(properties or {})
    options = {"device": device, "threads": threads, "precise": precise, "properties": told}
    contestants = named_contestants(given, engine, Rivals(model, gguf), options)
    if rounds < 1 or output_len < 2 or min(*(prompt_lens or (1,)), *(batch_sizes or (1,))) < 1:
        raise UsageError("rounds, prompt_lens and batch_sizes must be at least 1, output_len at least 2")
    if not 0 <= seed < 2**64:
        raise UsageError(f"seed must be from 0 to 2**64 - 1, not {seed}")
    if profile:
        refuse_unprofiled(contestants)
    tell = on_progress or (lambda _: None)
    tell(f"{chosen}; measuring memory bandwidth")
    machine = {**machine_info(), "read_bandwidth_gbps": round(read_bandwidth(threads) / 1e9, 2)}
    meter = EnergyMeter()
    machine["energy"] = meter.missing or "RAPL, all sockets"
    first: dict[str, _FirstRun] = {}
    for contestant in contestants if cold else ():
        tell(f"{contestant.name}: from the disk, alone")
        first[contestant.name] = _first_run(
            contestant, threads, seed, lambda process: _shapes([process], prompt_lens, output_len, batch_sizes), profile
        )
    workers: list[ContestantProcess] = []
    try:
        for contestant in contestants:
            workers.append(ContestantProcess(contestant, threads))
            if profile:
                refuse_opened(contestant.name, workers[-1].loaded)
            tell(f"{contestant.name}: {_about(workers[-1])}")
        shapes = _shapes(workers, prompt_lens, output_len, batch_sizes)
        warm_up = {worker.name: [_measure(worker, shape, 0, seed, meter) for shape in shapes] for worker in workers}
        runs = []
        for number in range(1, rounds + 1):
            tell(f"round {number} of {rounds}")
            runs += [_measure(worker, shape, number, seed, meter) for shape in shapes for worker in workers]
        for worker in workers if not cold else ():
            first[worker.name] = _FirstRun(None, _first_ms(warm_up[worker.name][0]), worker.loaded_rss, worker.peak_rss)
        opened = tuple(_opened(worker, first[worker.name]) for worker in workers)
    finally:
        for worker in workers:
            worker.close()
    settings = {"rounds": rounds, "seed": seed, "threads": threads, "device": device, "precise": precise}
    settings["properties"] = told
    report = BenchReport(machine, settings, opened, tuple(runs))
    if engine == "auto":
        _keep(report, tell)
    return _profiled(report, contestants, threads, shapes, seed, tell) if profile else report


def _profiled(
    report: BenchReport,
    contestants: Sequence[Contestant],
    threads: int,
    shapes: Sequence[dict[str, int]],
    seed: int,
    tell: OnProgress,
) -> BenchReport:
    """The report with profiles; one that fails takes nothing of what was timed with it, and is a note."""
    found: list[Profile] = []
    notes = []
    for contestant in contestants:
        try:
            found += _profiles(contestant, threads, shapes, seed, tell)
        except RoundexportError as error:
            notes.append(f"no profile of {contestant.name}: {error}")
            tell(notes[-1])
    return replace(report, profiles=tuple(found), notes=tuple(notes))


def _profiles(
    contestant: Contestant, threads: int, shapes: Sequence[dict[str, int]], seed: int, tell: OnProgress
) -> list[Profile]:
    """What a contestant's operators take at every shape, in a process of its own."""
    tell(f"{contestant.name}: profile")
    process = ContestantProcess(contestant, threads)
    try:
        found = []
        for shape in shapes:
            reply = process.ask({**_request(process, shape, 0, seed), "do": "profile"})
            found += [Profile(contestant.name, shape, phase, **reply[phase]) for phase in PHASES]
        return found
    finally:
        process.close()


def _keep(report: BenchReport, tell: OnProgress) -> None:
    """Put what `load` chooses by into the user's table."""
    rows = engine_rows(report)
    for row in rows:
        tell(f"{row.engine}: {row}")
    if rows:
        tell(f"kept in {keep(rows)}; load takes an engine where the interval lies above 1")
    else:
        tell(
            "nothing was kept: auto chooses between engines of a decoder, after five rounds on CPU as shipped, on a "
            f"machine that does nothing else (load {report.machine['load_1min']} before)"
        )


def _about(process: ContestantProcess) -> str:
    """Engine, version and threads of a contestant, and why this engine."""
    info = process.loaded["info"]
    said = f"{info.get('engine')} {info.get('version', '')}, {info.get('threads')} threads"
    choice = process.loaded.get("choice")
    return f"{said}; {choice}" if choice else said


def _first_run(
    contestant: Contestant,
    threads: int,
    seed: int,
    shapes: Callable[[ContestantProcess], list[dict[str, int]]],
    profile: bool,
) -> _FirstRun:
    """Load a contestant from the disk and run every shape once, nobody else being there."""
    cold = forget(contestant.files)
    process = ContestantProcess(contestant, threads)
    try:
        if profile:
            refuse_opened(contestant.name, process.loaded)
        runs = [_measure(process, shape, 0, seed, EnergyMeter()) for shape in shapes(process)]
        load_ms = process.loaded["load_ms"] if cold else None
        return _FirstRun(load_ms, _first_ms(runs[0]), process.loaded_rss, process.peak_rss)
    finally:
        process.close()


def _first_ms(run: Run) -> float:
    return run.metrics["ttft_ms" if "ttft_ms" in run.metrics else "latency_ms"]


def _opened(process: ContestantProcess, first: _FirstRun) -> Opened:
    """What is known of a contestant at the end."""
    loaded = process.loaded
    return Opened(
        name=process.name,
        task=process.task,
        load_ms=loaded["load_ms"],
        cold_load_ms=first.load_ms,
        first_inference_ms=first.first_ms,
        loaded_rss_mib=first.loaded_rss / 2**20,
        peak_rss_mib=first.peak_rss / 2**20,
        weight_bytes=loaded.get("weight_bytes"),
        kl=loaded.get("kl"),
        kl_over=loaded.get("kl_over"),
        info=loaded["info"],
    )


def _shapes(
    workers: Sequence[ContestantProcess],
    asked: Sequence[int] | None,
    output_len: int,
    batch_sizes: Sequence[int] | None,
) -> list[dict[str, int]]:
    tasks = {worker.task for worker in workers}
    if len(tasks) > 1:
        raise UsageError(
            f"decoders and encoders cannot be timed against each other: {[(w.name, w.task) for w in workers]}"
        )
    decoder = tasks == {"generate"}
    limit = min(worker.max_context for worker in workers)
    room = limit - (output_len if decoder else 0)
    prompt_lens = asked or sorted({max(1, min(usual, room)) for usual in _USUAL_LENS})
    longest = max(prompt_lens) + limit - room
    if longest > limit:
        raise UsageError(
            f"{longest} tokens were asked for, the shortest max_context here is {limit}; give shorter prompts"
        )
    if decoder:
        together = ({} if size == 1 else {"batch_size": size} for size in batch_sizes or (1,))
        return [{"prompt_len": n, "output_len": output_len, **size} for size in together for n in prompt_lens]
    return [{"text_len": n, "batch_size": size} for n in prompt_lens for size in batch_sizes or (1, 8)]


def _measure(worker: ContestantProcess, shape: dict[str, int], number: int, seed: int, meter: EnergyMeter) -> Run:
    """One measurement; ``number`` 0 is the warm-up."""
    request = _request(worker, shape, number, seed)
    if worker.task == "generate":
        before = meter.joules()
        reply = worker.ask(request)
        spent = per_token(before, meter.joules(), shape.get("batch_size", 1) * shape["output_len"])
        return _decoder_run(worker.name, number, shape, reply, spent)
    reply = worker.ask(request)
    metrics = {"latency_ms": reply["ms"], "texts_per_s": shape["batch_size"] / reply["ms"] * 1e3}
    return Run(worker.name, number, shape, metrics, reply["sha256"])


def _request(worker: ContestantProcess, shape: dict[str, int], number: int, seed: int) -> dict[str, Any]:
    """What a contestant is asked in a round: prompts, or texts, that are the same for all of them."""
    random = np.random.default_rng([seed, number, *shape.values()])
    if worker.task == "generate":
        rows = shape.get("batch_size", 1)
        prompts = random.integers(0, worker.vocab_size, (rows, shape["prompt_len"])).tolist()
        request = {"do": "generate", "prompt": prompts[0], "output_len": shape["output_len"]}
        return request if rows == 1 else {**request, "others": prompts[1:]}
    batch = random.integers(0, worker.vocab_size, (shape["batch_size"], shape["text_len"])).tolist()
    return {"do": "embed", "batch": batch}


def _decoder_run(name: str, number: int, shape: dict[str, int], reply: dict[str, Any], joules: float | None) -> Run:
    tokens = reply.get("tokens")
    if tokens is not None and len(tokens) != shape["output_len"]:
        raise RoundexportError(f"{name} wrote {len(tokens)} tokens, {shape['output_len']} were asked for")
    first, gaps, rows = reply["first_ms"], reply.get("step_ms", ()), shape.get("batch_size", 1)
    tpot = sum(gaps) / len(gaps) if gaps else reply["tpot_ms"]
    metrics = {
        "ttft_ms": first,
        "tpot_ms": tpot,
        "prefill_tps": rows * shape["prompt_len"] / first * 1e3,
        "decode_tps": rows * 1e3 / tpot,
        "e2e_ms": first + tpot * (shape["output_len"] - 1),
    }
    if joules is not None:
        metrics["joules_per_token"] = joules
    digest = "" if tokens is None else hashlib.sha256(np.array(tokens, np.int64).tobytes()).hexdigest()
    return Run(name, number, shape, metrics, digest, tuple(gaps))
