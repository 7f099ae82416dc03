"""How long one token's product with a quantized weight takes on this machine, measured once and remembered.

A decode step is a row of such products, so their times add up to what it costs, and they say which scheme is worth its
bits here: which of 2, 4 and 8 bits is fastest turns round with the instruction set, the runtime and the group size.

    measured   the runtime's own kernel, in the form that an export would store (targets/<name>/products.py)
    weights    so many copies, each with codes of its own, that they exceed the last-level cache twice over: a model's
               weights are read from memory at every token, and copies that fit in the cache would hide that
    time       of a run over all copies, divided by their number; schemes of one shape take turns, so that all meet the
               same drift of the machine; the median of the rounds, in nanoseconds

Times are kept in kernel_times.json in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache), under what decides
them: processor, instruction sets, threads, runtime and its version; remove the file to measure anew.  Other programs
that run meanwhile slow some kernels more than others: measure on an idle machine.
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from roundexport import plugins
from roundexport.environment.threads import choose_threads
from roundexport.errors import ArtifactError, UsageError
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec
from roundexport.storage.atomic import replace_file
from roundexport.storage.strict_json import decode, encode, parse_format

FORMAT = "roundexport-kernel-times/1"
FILE = "kernel_times.json"
_LEAST_BYTES, _MOST_BYTES = 64 << 20, 1 << 30  # weights of one scheme together
_MOST_COPIES = 512
_ROUNDS = 15


@dataclass(frozen=True)
class Product:
    """One product to time.

    Args:
        rows: N.
        width: K.
        spec: scheme of the weight.
    """

    rows: int
    width: int
    spec: QuantSpec

    def key(self) -> str:
        """Name in the file, as in ``3072x1024 int4 g128 sym``."""
        return f"{self.rows}x{self.width} {self.spec.describe()}"


@dataclass(frozen=True)
class ProductKernels:
    """What a target's products.py offers as ``PRODUCTS``.

    Args:
        products: (weights of one scheme and shape, threads) -> what multiplies one token's activations with each of
            the weights, once per call.
        merged: weights of one form that share an input become one product in an export.
        library: the runtime, by its distribution's name; times hold for one version of it.
    """

    products: Callable[[Sequence[QuantizedLinear], int], Callable[[], None]]
    merged: bool
    library: str


@dataclass(frozen=True)
class Bench:
    """Where and how products are timed.

    Args:
        target: ``onnx`` or ``openvino``.
        threads: that take part; None: one per physical core.
        rounds: runs that the median is taken of.
        folder: where the times are kept; None: the user's cache folder.
        bytes_of_copies: bytes of all copies of a weight; None: twice the last-level cache, at least 64 MiB.

    Raises:
        UsageError: a number below 1.
    """

    target: str = "onnx"
    threads: int | None = None
    rounds: int = _ROUNDS
    folder: Path | None = None
    bytes_of_copies: int | None = None

    def __post_init__(self) -> None:
        for name in ("threads", "rounds", "bytes_of_copies"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")


@dataclass(frozen=True)
class _Document:
    """kernel_times.json: machine and runtime -> product -> nanoseconds."""

    times: dict[str, dict[str, int]]
    format: str = FORMAT


def cache_folder() -> Path:
    """The user's cache folder of roundexport."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "roundexport"


def kernel_times(
    products: Iterable[Product], bench: Bench | None = None, on_progress: Callable[[str], None] = lambda line: None
) -> dict[Product, int]:
    """Nanoseconds that each product takes; what was timed before under the same conditions is not timed again.

    Args:
        products: in any order, repeated or not.
        bench: where and how.
        on_progress: called with a line of text before each shape is timed.

    Raises:
        UsageError: no such target, or it times no products.
    """
    bench = bench or Bench()
    kernels = _kernels(bench.target)
    threads = choose_threads(bench.threads).count
    path = (bench.folder or cache_folder()) / FILE
    conditions = _conditions(bench.target, kernels.library, threads)
    known = _read(path).get(conditions, {})
    wanted = list(dict.fromkeys(products))
    missing = [product for product in wanted if product.key() not in known]
    by_shape: dict[tuple[int, int], list[Product]] = {}
    for product in missing:
        by_shape.setdefault((product.rows, product.width), []).append(product)
    for (rows, width), group in by_shape.items():
        on_progress(f"timing {len(group)} schemes at {rows}×{width} on {bench.target}")
        found = _time(group, kernels, threads, bench)
        known = {**known, **{product.key(): found[product] for product in group}}
        _write(path, conditions, known)
    return {product: known[product.key()] for product in wanted}


def merged(target: str) -> bool:
    """Whether a target makes one product of weights that share an input and a scheme."""
    return _kernels(target).merged


def _kernels(target: str) -> ProductKernels:
    kernels: ProductKernels = plugins.load_value("targets", target, "PRODUCTS", ProductKernels, part="products")
    return kernels


def _time(group: list[Product], kernels: ProductKernels, threads: int, bench: Bench) -> dict[Product, int]:
    """Time products of one shape, in turn."""
    calls: dict[Product, tuple[Callable[[], None], int]] = {}
    for product in group:
        weights = _weights(product, bench.bytes_of_copies or _enough_bytes())
        calls[product] = kernels.products(weights, threads), len(weights)
        calls[product][0]()  # the first run pays for packing and memory
    found: dict[Product, list[float]] = {product: [] for product in group}
    for _ in range(bench.rounds):
        for product, (call, copies) in calls.items():
            since = time.perf_counter_ns()
            call()
            found[product].append((time.perf_counter_ns() - since) / copies)
    return {product: max(1, round(median(times))) for product, times in found.items()}


def _weights(product: Product, total: int) -> list[QuantizedLinear]:
    """Copies of a weight that differ in every code, ``total`` bytes of them, at least two."""
    spec, rows, width = product.spec, product.rows, product.width
    copies = min(_MOST_COPIES, max(2, -(-total * 8 // spec.storage_bits(rows, width))))
    draw = np.random.default_rng(0)
    shape = (rows, spec.groups(width))
    made = []
    for _ in range(copies):
        codes = draw.integers(0, 256, (rows, spec.row_bytes(width)), np.uint8)
        zero_points = None if spec.symmetric else draw.integers(0, spec.max_code + 1, shape, np.uint8)
        made.append(QuantizedLinear(spec, width, codes, np.full(shape, 2.0**-7, spec.scale_array), zero_points))
    return made


def _enough_bytes() -> int:
    from roundexport.runtime.machine import machine_info

    last_level = (machine_info()["l3_mib"] or 0) * 2**20
    return int(min(max(2 * last_level, _LEAST_BYTES), _MOST_BYTES))


def _conditions(target: str, library: str, threads: int) -> str:
    from roundexport.runtime.machine import machine_info

    info: dict[str, Any] = machine_info()
    extensions = " ".join(info["instruction_sets"]) or "no known extensions"
    runtime = f"{library} {importlib.metadata.version(library)}"
    return f"{info['cpu']}, {extensions}, {threads} threads, {target}, {runtime}"


def _read(path: Path) -> dict[str, dict[str, int]]:
    """What was timed before; nothing where the file is absent or damaged: times can be had again."""
    try:
        return decode(_Document, parse_format(path.read_bytes(), FORMAT, str(path)), str(path)).times
    except (OSError, ArtifactError):
        return {}


def _write(path: Path, conditions: str, known: dict[str, int]) -> None:
    """Add to the file what another process may have added to meanwhile."""
    times = _read(path)
    times[conditions] = {**times.get(conditions, {}), **known}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, encode(_Document(times)))
