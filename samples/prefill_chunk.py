"""How many tokens of a prompt a run of the graph should read: time to first token at several sizes, in turn.

    python samples/prefill_chunk.py PACKAGE… [--chunks 128,256,512,1024] [--prompts 128,1024] [--rounds 9] [--threads 2]

Every package is opened once per size (`EngineOptions.prefill_chunk`; packages whose layers carry states read 256 at a
time whatever is asked, see runtime/engines/_states.py).  In each round every prompt length is read at every size, in
an order that turns with the round, with the same new random tokens; ratios are taken inside a round, to 512, which is
the default.  A size that no prompt fills reads it in one run like the next smaller one: its ratio tells the noise.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from roundexport.formats.package import read_package
from roundexport.runtime import Decoder
from roundexport.runtime.benchmarking.report import interval
from roundexport.runtime.loading import open_with
from roundexport.runtime.machine import machine_info
from roundexport.runtime.types import EngineOptions

ENGINES = {"onnx": "ort", "openvino": "ov"}
DEFAULT = 512


def first_token_ms(decoder: Decoder, prompt: Sequence[int]) -> float:
    """From the prompt to the logits behind it."""
    began = time.perf_counter()
    with decoder.start(rows=1, expected=len(prompt) + 1) as session:
        session.extend({session.add()[0]: prompt})
    return (time.perf_counter() - began) * 1e3


def measure(
    package: Path, chunks: Sequence[int], lengths: Sequence[int], rounds: int, threads: int
) -> dict[tuple[int, int], list[float]]:
    """(prompt length, chunk) -> milliseconds by round."""
    manifest = read_package(package, check_hashes=False)
    opened = {
        size: open_with(package, ENGINES[manifest.target], EngineOptions(threads=threads, prefill_chunk=size))
        for size in chunks
    }
    times: dict[tuple[int, int], list[float]] = {(length, size): [] for length in lengths for size in chunks}
    for number in range(rounds + 1):
        turned = [*chunks[number % len(chunks) :], *chunks[: number % len(chunks)]]
        for length in lengths:
            prompt = np.random.default_rng([number, length]).integers(0, manifest.vocab_size, length).tolist()
            for size in turned:
                decoder = opened[size]
                assert isinstance(decoder, Decoder), f"{package} is an encoder"
                took = first_token_ms(decoder, prompt)
                if number:  # the first round warms up
                    times[length, size].append(took)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", type=Path)
    parser.add_argument("--chunks", default="128,256,512,1024")
    parser.add_argument("--prompts", default="128,1024")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    chunks, lengths = ([int(part) for part in text.split(",")] for text in (given.chunks, given.prompts))
    if DEFAULT not in chunks:
        parser.error(f"--chunks needs {DEFAULT}, which ratios are to")
    print(f"| package | prompt | chunk | TTFT ms (median) | to {DEFAULT} (95 %) |")
    print("|---|--:|--:|--:|--:|", flush=True)
    for package in given.packages:
        times = measure(package, chunks, lengths, given.rounds, given.threads)
        for (length, size), taken in times.items():
            ratios = [one / base for one, base in zip(taken, times[length, DEFAULT], strict=True)]
            low, high = interval(ratios)
            spread = "" if low is None or high is None else f" ({low:.3f}–{high:.3f})"
            ratio = f"{np.median(ratios):.3f}{spread}"
            print(f"| {package.name} | {length} | {size} | {np.median(taken):.1f} | {ratio} |", flush=True)
    info = machine_info()
    print(json.dumps({key: info[key] for key in ("cpu", "instruction_sets", "load_1min", "versions")}))


if __name__ == "__main__":
    main()
