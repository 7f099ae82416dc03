"""What our ONNX Runtime loop adds to the graph's own time per token, at the shapes of Qwen3-0.6B.

    python samples/loop_overhead.py [--work DIR] [--layers 28] [--threads 2] [--rounds 5] [--tokens 64] [--prompt 128]
    python samples/loop_overhead.py --package PACKAGE

Makes a package with random weights (4 bits, groups of 32, embedding and head included; speed does not depend on values;
two minutes the first time, kept in DIR), opens it once, and lets two ways of making a token take turns, token by token,
in an order that is drawn:

    loop   one step of ``Decoder.generate``: token in, run, greedy choice among 151,936 logits, text out
    graph  ``session.run_with_iobinding`` alone, on the same session, everything bound before the clock starts, with the
           same token, the same number of tokens in its own cache, and the same memory for past and present

    share = loop / graph − 1, of pairs at the same length: median with a 95 % bootstrap interval; must be at most 5 %

Both pay for the same cold caches, as each reads all weights.  The last line is one JSON document; exit code 1 where the
median share is above 5 %.  Needs 3 GiB of disk and of memory, and ``roundexport[export-onnx]`` to make the package.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from roundexport.environment.threads import choose_threads
from roundexport.runtime import Decoder, GenerationSettings, load, machine_info
from roundexport.runtime.benchmarking.report import interval
from roundexport.runtime.types import Step

MOST = 0.05


class Graph:
    """The graph alone, on buffers of its own.

    Args:
        decoder: the opened package.
        capacity: tokens that the cache has room for.
    """

    def __init__(self, decoder: Decoder, capacity: int) -> None:
        from onnxruntime import OrtValue

        graph: Any = decoder.backend.graph  # type: ignore[attr-defined]
        self._value = OrtValue.ortvalue_from_numpy
        self._run, self._io, self._inputs = graph.session.run_with_iobinding, graph.session.io_binding(), graph.inputs
        random = np.random.default_rng(0)
        self._ids, self._logits = np.zeros((1, 1), np.int64), np.empty((1, 1, decoder.manifest.vocab_size), np.float32)
        self._kept = [self._value(self._ids), self._value(self._logits)]
        self._io.bind_ortvalue_input("input_ids", self._kept[0])
        self._io.bind_ortvalue_output("logits", self._kept[1])
        for layer in decoder.manifest.kv:
            for part in ("key", "value"):
                shape = (1, layer["num_kv_heads"], capacity, layer["head_dim"])
                name, value = f"{layer['layer']}.{part}", self._value(random.standard_normal(shape, np.float32))
                self._kept.append(value)
                self._io.bind_ortvalue_input(f"past_key_values.{name}", value)
                self._io.bind_ortvalue_output(f"present.{name}", value)

    def step(self, past: int, token: int) -> float:
        """Milliseconds of one run behind so many tokens."""
        self._ids[0, 0] = token
        bound = {"attention_mask": np.ones((1, past + 1), np.int64), "position_ids": np.array([[past]], np.int64)}
        values = {name: self._value(array) for name, array in bound.items() if name in self._inputs}
        for name, value in values.items():
            self._io.bind_ortvalue_input(name, value)
        began = time.perf_counter()
        self._run(self._io)
        return 1000 * (time.perf_counter() - began)


def loop_step(steps: Iterator[Step]) -> tuple[float, int]:
    """Milliseconds of one step of the loop, and its token."""
    began = time.perf_counter()
    step = next(steps)
    token = step.tokens[0]
    assert token is not None
    return 1000 * (time.perf_counter() - began), token


def measure(decoder: Decoder, rounds: int, prompt: int, tokens: int) -> list[tuple[float, float]]:
    """Milliseconds of loop and graph, in pairs; the first round warms up and is thrown away."""
    graph, random, pairs = Graph(decoder, prompt + tokens + 1), np.random.default_rng(1), []
    for number in range(rounds + 1):
        ids = random.integers(3, 250, prompt).tolist()
        steps = decoder.generate([ids], GenerationSettings(max_new_tokens=tokens + 1, ignore_eos=True))
        _, token = loop_step(steps)  # the prompt
        for past in range(prompt, prompt + tokens):
            if random.random() < 0.5:
                alone = graph.step(past, token)
                looped, token = loop_step(steps)
            else:
                before, (looped, token) = token, loop_step(steps)
                alone = graph.step(past, before)
            if number:
                pairs.append((looped, alone))
    return pairs


def main() -> None:
    """Make or open a package, time both, say the share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "loop_overhead")
    parser.add_argument("--package", help="an ONNX package of a decoder, instead of one with random weights")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128)
    given = parser.parse_args()
    package = given.package
    if package is None:
        from bench_vendor_onnx import Wanted, make_packages

        work = given.work / f"{given.layers} layers"
        work.mkdir(parents=True, exist_ok=True)
        package = make_packages(work, Wanted(given.layers, 32, vendor=False))["ours"]
    threads = choose_threads(given.threads)
    decoder = load(package, engine="ort", threads=threads.count)
    assert isinstance(decoder, Decoder), f"{package} is an encoder"
    pairs = measure(decoder, given.rounds, given.prompt, given.tokens)
    shares = [looped / alone - 1 for looped, alone in pairs]
    share, (low, high) = statistics.median(shares), interval(shares)
    looped, alone = (statistics.median(column) for column in zip(*pairs, strict=True))
    machine = machine_info()
    print(f"{machine['cpu']}, {' '.join(machine['instruction_sets'])}, {threads}", file=sys.stderr)
    print(
        f"{'held' if share <= MOST else 'FAILED'}  the loop adds {share:.2%} ({low:.2%} to {high:.2%}) to the graph's "
        f"{alone:.2f} ms per token; n {len(pairs)}",
        file=sys.stderr,
    )
    print(
        json.dumps(
            {
                "share": round(share, 5), "interval": [round(low or 0, 5), round(high or 0, 5)], "n": len(pairs),
                "loop_ms": round(looped, 3), "graph_ms": round(alone, 3), "threads": threads.count,
                "versions": machine["versions"],
            }
        )
    )  # fmt: skip
    sys.exit(0 if share <= MOST else 1)


if __name__ == "__main__":
    main()
