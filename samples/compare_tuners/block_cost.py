r"""What tuning one block of a real shape takes: CPU seconds, wall clock and peak memory, ours and auto-round.

    python samples/compare_tuners/block_cost.py --python auto-round=.auto-round/bin/python
    python samples/compare_tuners/block_cost.py --tuner "finished=ours:--finish end_to_end" --repeat 3
    python samples/compare_tuners/block_cost.py --shape 4b --memory --tuner "default=ours:--recipe default --max-ram 8"

The model has the shapes of Qwen3-0.6B (hidden 1024, 16 heads of 128, 8 key/value heads, ffn 3072), or with --shape 1b
of a billion weights (1536, 16 heads, ffn 4608, 28 blocks), 4b of Qwen3-4B (2560, 32 heads, ffn 9728), 8b of Qwen3-8B
(4096, 32 heads, ffn 12288), or 30b-a3b of Qwen3-30B-A3B (2048, 32 heads, 128 experts of 768, 8 per token), random
weights, one or two blocks, and the vocabulary (4096) and tokenizer of the sample model: the full one would add to the
float logits, which block-wise tuning does not compute, and speed and memory do not depend on the values of weights.
What a finish takes depends on all blocks and on the logits, so --memory takes more of both:

    python samples/compare_tuners/block_cost.py --shape 1b --memory --blocks 28 --vocabulary 151680 --samples 16 \
        --tuner "finished=ours:--finish end_to_end --max-ram 16 --steps 2"

    per block  =  run of two blocks - run of one block              start-up, embedding and collecting inputs cancel
    auto-round's at S steps  =  per block at n steps + (S - n) · (run of 2n steps - run of n steps) / n

so auto-round's is extrapolated from n steps (--steps) to those of its setting; ours is run as it is.  What a finish of
ours does after the blocks (--finish end_to_end) grows with the blocks too and is in the difference.

A newer processor stands for one with AVX2 alone where torch, oneDNN, MKL, NumPy's OpenBLAS and numba are told so:

    export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 OPENBLAS_CORETYPE=Haswell \
        NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt,+sse4.2

ours then takes float32 products by itself.  What such a run cannot show: caches, memory and clock of an older one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from contestants import Contestant, Scheme
from cost import Cost, measured, median_cost

from roundexport.calibration.samples import load_calibration
from roundexport.model.checkpoint import Checkpoint

SAMPLES = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(SAMPLES))
from random_checkpoint import SHAPES, make_checkpoint  # noqa: E402  (a script beside this folder)

VOCABULARY = 4096


@dataclass(frozen=True)
class Run:
    """One process: a contestant, how many blocks the model has, and steps where they are not the contestant's own."""

    contestant: Contestant
    blocks: int
    steps: int | None = None


def runs_of(contestant: Contestant, steps: int) -> Iterator[Run]:
    """The processes that a contestant's cost per block takes; the first one's model has one block."""
    if contestant.tuner != "auto-round":
        yield from (Run(contestant, 1), Run(contestant, 2))
    else:
        yield from (Run(contestant, 1, steps), Run(contestant, 2, steps), Run(contestant, 1, 2 * steps))


def execute(run: Run, scratch: Path, options: argparse.Namespace) -> Cost:
    """Run one process on the model in ``scratch``/model-<blocks> and its tokens."""
    contestant = run.contestant
    if contestant.tuner == "ours":
        size = f" --num-samples {options.samples} --sample-len {options.length}"
        contestant = replace(contestant, variant=contestant.variant + size)
    settings = contestant.settings(Scheme.parse(options.scheme), options.calibration)
    if run.steps is not None:
        settings["iters"] = run.steps
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        where = (str(scratch / f"model-{run.blocks}"), str(scratch / "ids.npy"), out)
        return measured([contestant.python, str(contestant.side), *where, json.dumps(settings)], options.threads)


def per_block(contestant: Contestant, costs: dict[Run, Cost], options: argparse.Namespace) -> tuple[float, float]:
    """CPU and wall seconds per block at the contestant's own number of steps."""
    one, two, *more = (costs[run] for run in runs_of(contestant, options.steps))
    found = []
    for name in ("cpu_s", "wall_s"):
        block = getattr(two, name) - getattr(one, name)
        if more:
            step = (getattr(more[0], name) - getattr(one, name)) / options.steps
            steps = contestant.settings(Scheme.parse(options.scheme), options.calibration)["iters"]
            block += (steps - options.steps) * step
        found.append(block)
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuner", action="append", help="contestant, see contestants.py; ours and auto-round")
    parser.add_argument("--python", action="append", default=[], metavar="TUNER=PATH", help="a tuner's interpreter")
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--memory", action="store_true", help="one model only, for the peak: no cost per block")
    parser.add_argument("--blocks", type=int, default=1, help="of that model")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--scheme", default="4,128,asym", help="bits,group,sym|asym")
    parser.add_argument("--calibration", default=str(SAMPLES / "text" / "calibration.txt"))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512, help="tokens per sample")
    parser.add_argument("--steps", type=int, default=10, help="steps of auto-round that are run")
    parser.add_argument("--repeat", type=int, default=1, help="rounds, all processes in turn; medians are shown")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if options.blocks != 1 and not options.memory:
        parser.error("--blocks is of --memory: cost per block is the difference of two and one")
    pythons = dict(pair.split("=", 1) for pair in options.python)
    names = options.tuner or ["default=ours:--recipe default", *pythons]
    contestants = [Contestant.parse(name, pythons) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        sizes = (options.blocks,) if options.memory else (1, 2)
        for blocks in sizes:
            make_checkpoint(scratch / f"model-{blocks}", options.shape, blocks, options.vocabulary)
        size = {"num_samples": options.samples, "sample_len": options.length}
        ids = load_calibration(Checkpoint.open(scratch / f"model-{sizes[0]}"), options.calibration, **size).ids
        np.save(scratch / "ids.npy", ids)
        print(f"{options.scheme}, tokens {list(ids.shape)}, {options.threads} threads, load {os.getloadavg()[0]:.1f}")
        runs = [run for contestant in contestants for run in runs_of(contestant, options.steps)]
        if options.memory:
            runs = [replace(run, blocks=options.blocks) for run in runs if run.blocks == 1]
        costs: dict[Run, list[Cost]] = {run: [] for run in runs}
        for _ in range(options.repeat):
            for run in runs:
                costs[run].append(execute(run, scratch, options))
                print(f"  {run.contestant.label}, {run.blocks} blocks, steps {run.steps}: {costs[run][-1]}", flush=True)
    middle = {run: median_cost(each) for run, each in costs.items()}
    if options.memory:
        return
    print(f"\n{'tuner':20} {'CPU s/block':>12} {'wall s/block':>12} {'peak GiB':>9}")
    for contestant in contestants:
        cpu, wall = per_block(contestant, middle, options)
        peak = max(cost.peak_gib for run, cost in middle.items() if run.contestant == contestant)
        said = "  extrapolated" if contestant.tuner == "auto-round" else ""
        print(f"{contestant.label:20} {cpu:12.1f} {wall:12.1f} {peak:9.2f}{said}")


if __name__ == "__main__":
    main()
