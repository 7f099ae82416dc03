"""Does `roundexport bench` measure what others say of themselves?  Both sides on the same file, asked in turn.

    python samples/bench_agreement.py [--onnx PACKAGE] [--openvino PACKAGE] [--gguf FILE] [--rounds 11] [--threads 2]

    file         bench's contestant         held against
    --onnx       onnxruntime-genai          `append_tokens` and `generate_next_token` timed as its own benchmark does
    --openvino   openvino-genai             `perf_metrics` of `LLMPipeline.generate`: get_ttft, get_tpot
    --gguf       llama.cpp                  llama-bench on the PATH, ``-p P -n 0`` and ``-p 0 -n N -d P``

Prints medians of both, the median of the ratios inside each round, and its 95 % interval, by which it is told whether
they agree within 5 %.  On a machine that does other work too it mostly cannot be told; there ``--same-call`` helps: the
libraries' clocks run inside the very calls that bench times (not for llama.cpp, whose tool is a process of its own).
llama.cpp's bench side needs llama-cpp-python; both of its builds must have the same version and the same options.

Source: benchmark/python/benchmark_e2e.py of https://github.com/microsoft/onnxruntime-genai;
https://docs.openvino.ai/2026/openvino-workflow-generative/inference-with-genai.html, performance metrics.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import roundexport
from roundexport.environment.threads import choose_threads
from roundexport.runtime import Contestant, load, machine_info, package_contestant
from roundexport.runtime.benchmarking.contestants import llama_cpp_contestant
from roundexport.runtime.benchmarking.generating import timed_generation
from roundexport.runtime.benchmarking.llama_cpp_worker import BenchTool
from roundexport.runtime.benchmarking.report import BenchReport, interval
from roundexport.runtime.benchmarking.worker import serve

Reply = dict[str, Any]
Generate = Callable[[list[int], int], Reply]


def onnxruntime_genai(package: str, threads: int) -> tuple[Reply, Generate]:
    """Its own loop, timed as its own benchmark does."""
    import onnxruntime_genai as genai

    decoder = load(package, engine="onnxruntime-genai", threads=threads)
    model = decoder._loop._model  # type: ignore[union-attr]  # the same model with the same options, another clock

    def generate(prompt: list[int], count: int) -> Reply:
        length = len(prompt) + count
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = genai.Generator(model, parameters)
        began = time.perf_counter()
        generator.append_tokens(np.asarray([prompt], np.int32))
        generator.generate_next_token()
        first, steps = time.perf_counter() - began, []
        for _ in range(count - 1):
            began = time.perf_counter()
            generator.generate_next_token()
            steps.append((time.perf_counter() - began) * 1e3)
        return {"first_ms": first * 1e3, "step_ms": steps}

    return _about(decoder), generate


def openvino_genai(package: str, threads: int) -> tuple[Reply, Generate]:
    """Its performance metrics."""
    import openvino as ov
    import openvino_genai as genai

    decoder = load(package, engine="openvino-genai", threads=threads)
    pipeline = decoder._loop._pipeline  # type: ignore[union-attr]

    def generate(prompt: list[int], count: int) -> Reply:
        ids = np.asarray([prompt], np.int64)
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = count, True, False
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        metrics = pipeline.generate(inputs, config).perf_metrics
        return {"first_ms": metrics.get_ttft().mean, "tpot_ms": metrics.get_tpot().mean}

    return _about(decoder), generate


def llama_bench(gguf: str, threads: int) -> tuple[Reply, Generate]:
    """The tool of that name."""
    program = shutil.which("llama-bench")
    if program is None:
        sys.exit("put llama-bench on the PATH")
    tool = BenchTool(program, Path(gguf), threads)
    return {"vocab_size": tool.vocab_size, "max_context": tool.max_context, "info": tool.info()}, tool.generate


THEIRS = {"onnxruntime-genai": onnxruntime_genai, "openvino-genai": openvino_genai, "llama.cpp": llama_bench}


def _about(decoder: Any) -> Reply:
    manifest = decoder.manifest
    return {"vocab_size": manifest.vocab_size, "max_context": manifest.max_context, "info": decoder.info()}


def work(name: str, file: str, threads: int) -> None:
    """Their side, as a contestant."""
    held: list[Generate] = []

    def start() -> Reply:
        about, generate = THEIRS[name](file, threads)
        held.append(generate)
        return {"task": "generate", **about}

    def generate(prompt: list[int], count: int) -> Reply:
        return held[0](prompt, count)

    serve(start, generate, lambda _: {})


def pair(name: str, file: Path, threads: int) -> list[Contestant]:
    """Bench's contestant, and the other side."""
    if name == "llama.cpp":
        ours = llama_cpp_contestant(file, f"{name}, bench", threads=threads)
    else:
        ours = package_contestant(file, f"{name}, bench", engine=name, threads=threads)
    command = (sys.executable, "-P", str(Path(__file__).resolve()), "--work", name, str(file), str(threads))
    return [ours, Contestant(f"{name}, theirs", command)]


Clocks = tuple[float, float]  # milliseconds to the first token, and per token after it


def in_openvino_genai(decoder: Any) -> Callable[[], Clocks]:
    """What the library will have measured of the latest call."""
    pipeline, latest = decoder._loop._pipeline, []

    class Pipeline:
        def generate(self, *arguments: Any) -> Any:
            result = pipeline.generate(*arguments)
            latest[:] = [result.perf_metrics]
            return result

    decoder._loop._pipeline = Pipeline()
    return lambda: (latest[0].get_ttft().mean, latest[0].get_tpot().mean)


def in_onnxruntime_genai(decoder: Any) -> Callable[[], Clocks]:
    """What a clock around the library's two calls will have measured."""
    import onnxruntime_genai as genai

    library, spans = genai.Generator, []

    class Generator:
        def __init__(self, *arguments: Any) -> None:
            self._inner, self._read_ms = library(*arguments), 0.0
            spans.clear()

        def append_tokens(self, ids: Any) -> None:
            began = time.perf_counter()
            self._inner.append_tokens(ids)
            self._read_ms = (time.perf_counter() - began) * 1e3

        def generate_next_token(self) -> None:
            began = time.perf_counter()
            self._inner.generate_next_token()
            spans.append((time.perf_counter() - began) * 1e3 + self._read_ms)
            self._read_ms = 0.0

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    genai.Generator = Generator
    return lambda: (spans[0], float(np.mean(spans[1:])))


INSIDE = {"onnxruntime-genai": in_onnxruntime_genai, "openvino-genai": in_openvino_genai}


def same_calls(name: str, file: Path, threads: int, given: argparse.Namespace) -> list[str]:
    """Lines of the table for calls that both clocks measured."""
    decoder: Any = load(file, engine=name, threads=threads)
    clocks, random = INSIDE[name](decoder), np.random.default_rng(0)
    times: list[tuple[Clocks, Clocks]] = []
    for _ in range(given.rounds + 1):
        prompt = random.integers(0, decoder.manifest.vocab_size, given.prompt_len).tolist()
        reply = timed_generation(decoder, prompt, given.output_len)
        times.append(((reply["first_ms"], float(np.mean(reply["step_ms"]))), clocks()))
    found = []
    for place, figure in enumerate(("ttft_ms", "tpot_ms")):
        ours, theirs = ([both[side][place] for both in times[1:]] for side in (0, 1))
        found.append(line(name, figure, ours, theirs))
    return found


def lines(report: BenchReport) -> list[str]:
    """A table's line for each figure of each pair."""
    found = []
    for ours, theirs in pairwise(entry.name for entry in report.contestants):
        if not ours.endswith("bench"):
            continue
        for figure in ("ttft_ms", "tpot_ms"):
            times = [[r.metrics[figure] for r in report.runs if r.contestant == name] for name in (ours, theirs)]
            found.append(line(ours.removesuffix(", bench"), figure, *times))
    return found


def line(name: str, figure: str, ours: list[float], theirs: list[float]) -> str:
    """One line of the table."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, high = interval(ratios)
    between = "" if low is None else f" ({low:.3f}–{high:.3f})"
    medians = f"{np.median(ours):.2f} | {np.median(theirs):.2f} | {np.median(ratios):.3f}{between}"
    return f"| {name} | {figure} | {medians} | {told(low, high)} |"


def told(low: float | None, high: float | None) -> str:
    """Whether an interval says that a ratio lies within 5 % of 1."""
    if low is None or high is None or low <= 0.95 <= high or low <= 1.05 <= high:
        return "cannot be told"
    return "yes" if 0.95 < low and high < 1.05 else "no"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", type=Path)
    parser.add_argument("--openvino", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--same-call", action="store_true", help="both clocks around the very same calls")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        return work(given.work[0], given.work[1], int(given.work[2]))
    threads = choose_threads(given.threads).count
    files = {"onnxruntime-genai": given.onnx, "openvino-genai": given.openvino, "llama.cpp": given.gguf}
    chosen = {name: file for name, file in files.items() if file is not None}
    if not chosen:
        parser.error("give at least one of --onnx, --openvino, --gguf")
    before = machine_info()
    table = []
    for name, file in chosen.items() if given.same_call else ():
        table += same_calls(name, file, threads, given) if name in INSIDE else []
    for name, file in (
        () if given.same_call else chosen.items()
    ):  # a pair at a time: others that wait would only take memory
        report = roundexport.bench(
            pair(name, file, threads), prompt_lens=[given.prompt_len], output_len=given.output_len,
            rounds=given.rounds, threads=threads, cold=False, on_progress=lambda line: print(line, file=sys.stderr),
        )  # fmt: skip
        table += lines(report)
    loads = f"load {before['load_1min']} before, {machine_info()['load_1min']} after"
    print(f"{before['cpu']}, {' '.join(before['instruction_sets'])}, {threads} threads, {loads}")
    print(f"{given.prompt_len} tokens in, {given.output_len} out, {given.rounds} rounds in turn; {before['versions']}")
    print("| | figure | bench | theirs | bench / theirs, median of paired ratios (95 %) | within 5 % |")
    print("|---|---|---|---|---|---|", *table, sep="\n")


if __name__ == "__main__":
    main()
