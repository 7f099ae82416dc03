"""The product in C++ (kernels/native/) beside what the runtimes have, alone and in a whole decode step.

    python samples/kernel_speed.py products [--shape 3072x1024] [--seconds 8]     a table, one row per scheme
    python samples/kernel_speed.py decode FIRST SECOND … [--past 128] [--rounds 12]

Products: every contestant multiplies one token's activations with the same weights, more of them than fit in the cache,
in turn, on one thread; beside them stands how fast one thread reads memory.  Decode: packages with the ONNX target, in
turn, in ONNX Runtime on one thread: a step of one token behind ``--past`` others, 24 one after another of which the
first four are not counted, and a prompt of 128.  Times are processor time, so that waiting for other work on the
machine does not enter; medians, best in brackets.
Build the product first: python -m roundexport.kernels.native.build.  Needs `pip install roundexport[convert]`.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from roundexport.kernels.native.product import INSTRUCTION_SETS, NativeWeight, force
from roundexport.quant.packing import pack_codes
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec

SCHEMES = (QuantSpec(4, 32), QuantSpec(4, 64), QuantSpec(4, 128), QuantSpec(4, 64, symmetric=False), QuantSpec(3, 64),
           QuantSpec(2, 32), QuantSpec(2, 64), QuantSpec(8, 128))  # fmt: skip
OUT_OF_CACHE = 64 << 20
memory = np.ones(OUT_OF_CACHE // 8 * 4, np.uint64)


def in_turn(contestants: dict[str, Callable[[], object]], seconds: float, between: Callable[[], object]) -> dict:
    """Processor seconds of every call, by contestant."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(found[next(iter(found))]) < 5:
        for name, run in contestants.items():
            between()
            found[name] += timed(run, 1)
    return found


def timed(run: Callable[[], object], count: int) -> list[float]:
    times = []
    for _ in range(count):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return times


def shown(seconds: list[float], amount: float) -> str:
    return f"{amount / median(seconds) / 1e9:.1f} ({amount / min(seconds) / 1e9:.1f})"


def products(shape: tuple[int, int], seconds: float) -> None:
    from roundexport.targets.onnx.products import products as onnx_products
    from roundexport.targets.openvino.products import products as openvino_products

    rows, width = shape
    rng = np.random.default_rng(0)
    place = [0]

    def read() -> None:
        place[0] = (place[0] + 1) % 4
        np.add.reduce(memory[place[0] * (OUT_OF_CACHE // 8) : (place[0] + 1) * (OUT_OF_CACHE // 8)])

    print("| scheme | GB/s read by one thread | " + " | ".join(
        f"{name}, {unit}" for name in INSTRUCTION_SETS[:2] for unit in ("GB/s", "G weights/s")),
        "| ONNX Runtime, G weights/s | OpenVINO, G weights/s |")  # fmt: skip
    print("|---" * 8 + "|")
    for spec in SCHEMES:
        count = max(2, OUT_OF_CACHE * 8 // (rows * width * spec.bits))
        weights = [linear(rng, spec, rows, width) for _ in range(count)]
        own = [NativeWeight.of_linear(weight) for weight in weights]
        x = rng.standard_normal((1, width)).astype(np.float32)

        def ours(name: str, own: list[NativeWeight] = own, x: np.ndarray = x) -> None:
            force(name)
            for weight in own:
                weight.product(x)

        contestants: dict[str, Callable[[], object]] = {
            name: lambda name=name: ours(name) for name in INSTRUCTION_SETS[:2]
        }
        contestants |= {"onnx": onnx_products(weights, 1), "openvino": openvino_products(weights, 1), "memory": read}
        for run in contestants.values():
            run()
        times, values = in_turn(contestants, seconds, read), count * rows * width
        stored = sum(weight.nbytes for weight in own)
        cells = [shown(times["memory"], OUT_OF_CACHE)]
        for name in INSTRUCTION_SETS[:2]:
            cells += [shown(times[name], stored), shown(times[name], values)]
        cells += [shown(times[name], values) for name in ("onnx", "openvino")]
        print(f"| {spec.describe()} | {' | '.join(cells)} |", flush=True)


def linear(rng: np.random.Generator, spec: QuantSpec, rows: int, width: int) -> QuantizedLinear:
    codes = rng.integers(0, 1 << spec.bits, (rows, width), dtype=np.uint8)
    groups = width // (spec.group_size or width)
    scales = (rng.uniform(0.5, 1.5, (rows, groups)) / 64).astype(np.float16)
    points = None if spec.symmetric else rng.integers(0, 1 << spec.bits, (rows, groups), dtype=np.uint8)
    return QuantizedLinear(spec, width, pack_codes(codes, spec.bits), scales, points)


def decode(packages: list[Path], past: int, rounds: int) -> None:
    import onnxruntime as ort

    from roundexport.kernels.native.library import built

    steps: dict[str, Callable[[], object]] = {}
    prompts: dict[str, Callable[[], object]] = {}
    for package in packages:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.register_custom_ops_library(str(built()))
        session = ort.InferenceSession(str(package / "model.onnx"), options, providers=["CPUExecutionProvider"])
        steps[str(package)] = call(session, 1, past)
        prompts[str(package)] = call(session, 128, 0)
        steps[str(package)](), prompts[str(package)]()
    found = {name: [list[float](), list[float]()] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            found[name][0] += timed(step, 24)[4:]
            found[name][1] += timed(prompts[name], 1)
    print("| package | decode, ms | times the first | prompt of 128, ms | times the first |")
    print("|---" * 5 + "|")
    first = [median(times) for times in found[str(packages[0])]]
    for name, (step, prompt) in found.items():
        cells = [f"{median(times) * 1e3:.2f} ({min(times) * 1e3:.2f}) | {one / median(times):.2f}"
                 for times, one in zip((step, prompt), first, strict=True)]  # fmt: skip
        print(f"| {name} | {' | '.join(cells)} |")


def call(session: object, count: int, past: int) -> Callable[[], object]:
    rng, feeds = np.random.default_rng(0), {}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            feeds[value.name] = np.zeros((1, value.shape[1], past, value.shape[3]), np.float32)
        elif value.name == "attention_mask":
            feeds[value.name] = np.ones((1, past + count), np.int64)
        else:
            feeds[value.name] = rng.integers(5, 1000, (1, count)) if value.name == "input_ids" else np.arange(
                past, past + count)[None]  # fmt: skip
    return lambda: session.run(["logits"], feeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    alone = kinds.add_parser("products")
    alone.add_argument("--shape", default="3072x1024", help="NxK")
    alone.add_argument("--seconds", type=float, default=8)
    whole = kinds.add_parser("decode")
    whole.add_argument("packages", nargs="+", type=Path)
    whole.add_argument("--past", type=int, default=128)
    whole.add_argument("--rounds", type=int, default=12)
    given = parser.parse_args()
    if given.kind == "products":
        rows, width = map(int, given.shape.split("x"))
        products((rows, width), given.seconds)
    else:
        decode(given.packages, given.past, given.rounds)


if __name__ == "__main__":
    main()
