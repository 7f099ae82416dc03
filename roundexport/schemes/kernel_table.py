"""The kernel times of a model's shapes as a table: which scheme is fast on this machine (`bench --kernels`).

Shapes are those of the linears in the blocks; where the target makes one product of layers that share an input, of
these together, as far as their names tell (query, key and value; gate and up).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from roundexport.model.blocks import linears, weight_of
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.streamed_model import StreamedModel
from roundexport.progress import Progress
from roundexport.quant.spec import QuantSpec

from .allocate import BASELINE
from .kernel_timing import Bench, Product, kernel_times, merged
from .rules import fitting

SCHEMES = (
    BASELINE, QuantSpec(4, 128), QuantSpec(4, 128, False), QuantSpec(3, 128, False), QuantSpec(2, 64, False),
    QuantSpec(2, 128, False), QuantSpec(2, 128), QuantSpec(8, 128),
)  # fmt: skip
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))


def kernel_table(
    model: str | Path,
    bench: Bench | None = None,
    schemes: Sequence[QuantSpec] = SCHEMES,
    on_progress: Callable[[str], None] = lambda line: None,
    progress: bool | Progress = False,
) -> list[dict[str, Any]]:
    """Time every scheme at every shape of a model's linears.

    Args:
        model: Hugging Face model folder or hub id.
        bench: target, threads, rounds and cache.
        schemes: to time; a group size that does not divide K falls back as in tuning.
        on_progress: called with a line of text before each shape is timed.
        progress: report on stderr, or where to report, what it takes to open the model.

    Returns:
        One row per shape and scheme: microseconds of one token's product, the bytes of the artifact's weight read per
        second, and the speed relative to 4 bits, block 32, symmetric.

    Raises:
        UsageError: no such target.
        CheckpointError: the model cannot be read.
    """
    bench = bench or Bench()
    shapes = _shapes(model, merged(bench.target), progress)
    wanted = {
        shape: list(dict.fromkeys(Product(*shape, fitting(spec, shape[1])[0]) for spec in (BASELINE, *schemes)))
        for shape in shapes
    }
    times = kernel_times((product for products in wanted.values() for product in products), bench, on_progress)
    table = []
    for shape, products in wanted.items():
        base = times[products[0]]
        for product in products:
            nanoseconds, size = times[product], product.spec.storage_bits(*shape) / 8
            table.append(
                {
                    "layer": shapes[shape],
                    "N×K": f"{shape[0]}×{shape[1]}",
                    "scheme": product.spec.describe(),
                    "µs": round(nanoseconds / 1e3, 1),
                    "GB/s": round(size / nanoseconds, 1),
                    f"× {BASELINE.describe()}": round(base / nanoseconds, 2),
                }
            )
    return table


def _shapes(model: str | Path, together: bool, progress: bool | Progress) -> dict[tuple[int, int], str]:
    """Shapes (N, K), each with the names of the first layers that have it."""
    found: dict[tuple[int, int], str] = {}
    for block in StreamedModel(Checkpoint.open(model, progress=progress)).stack.blocks:
        modules = {name: weight_of(module).shape for name, module in linears(block).items()}
        for group in _TOGETHER if together else ():
            names = [name for name in modules if name.rpartition(".")[2] in group]
            folders = {name.rpartition(".")[0] for name in names}
            if len(names) == len(group) and len(folders) == 1:
                shapes = [modules.pop(name) for name in names]
                label = " + ".join(name.rpartition(".")[2] for name in names)
                found.setdefault((sum(shape[0] for shape in shapes), shapes[0][1]), label)
        for name, shape in modules.items():
            found.setdefault((shape[0], shape[1]), name.rpartition(".")[2])
    return found
