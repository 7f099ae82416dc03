"""Tokens per second of one stream and of several: our scheduler on each package, openvino-genai's continuous batching.

concurrent_streams.py PACKAGE… [--streams 8] [--tokens 128] [--prompt 32] [--rounds 3] [--threads N]

Every stream has its own random prompt; end-of-sequence is ignored, choice is greedy.  All contestants are open in one
process and asked in turn, after a round that does not count; medians, and every round of the several.
"""

import argparse
import queue
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from roundexport.runtime import Decoder, GenerationSettings, load, machine_info
from roundexport.runtime.scheduler import Scheduler

Writes = Callable[[list[list[int]]], None]


def ours(package: Path, threads: int | None, tokens: int) -> Writes:
    """Our scheduler."""
    decoder = load(package, threads=threads)
    print(f"{package.name}, ours: {decoder.backend.info()['threads']} threads")
    assert isinstance(decoder, Decoder), f"{package} is an encoder"
    scheduler = Scheduler(decoder)
    settings = GenerationSettings(max_new_tokens=tokens, ignore_eos=True)

    def write(prompts: list[list[int]]) -> None:
        come: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in prompts]
        for prompt, pieces in zip(prompts, come, strict=True):
            scheduler.submit(prompt, settings, pieces.put)
        for pieces in come:
            while pieces.get().finished is None:
                pass

    return write


def vendors(package: Path, threads: int | None, tokens: int) -> Writes:
    """openvino-genai's own continuous batching."""
    decoder = load(package, engine="openvino-genai-batching", threads=threads)
    assert isinstance(decoder, Decoder)

    def write(prompts: list[list[int]]) -> None:
        assert [len(found) for found in decoder.greedy(prompts, tokens)] == [tokens] * len(prompts)

    return write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", type=Path)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    contestants = {f"{package.name}, ours": ours(package, given.threads, given.tokens) for package in given.packages}
    for package in given.packages:
        if (package / "openvino_model.xml").exists():
            contestants[f"{package.name}, openvino-genai"] = vendors(package, given.threads, given.tokens)
    found: dict[tuple[str, int], list[float]] = {}
    for number in range(given.rounds + 1):
        for name, write in contestants.items():
            for streams in (1, given.streams):
                random = np.random.default_rng([number, streams])
                prompts = random.integers(10, 2000, (streams, given.prompt)).tolist()
                began = time.perf_counter()
                write(prompts)
                speed = streams * given.tokens / (time.perf_counter() - began)
                if number:
                    found.setdefault((name, streams), []).append(speed)
    machine = machine_info()
    print(f"{machine['cpu']}, {' '.join(machine['instruction_sets'])}, {given.threads or 'default'} threads")
    for name in contestants:
        one, several = (statistics.median(found[name, streams]) for streams in (1, given.streams))
        rounds = ", ".join(f"{speed:.0f}" for speed in found[name, given.streams])
        print(
            f"{name:28} 1: {one:5.0f} tok/s   {given.streams}: {several:5.0f}   {several / one:.2f} times   ({rounds})"
        )


if __name__ == "__main__":
    main()
