"""How long `tune --cluster` takes per block, on paper: from the model's shape, the tokens, the workers and their rates.

    python samples/cluster/cost_model.py                          8 billion and 70 billion parameters on 1 to 16 nodes
    python samples/cluster/cost_model.py --flops 5e10 --network inf --samples 64 --length 256 --shape 256,768,4

Floating-point operations of a block of a gated decoder; P its weights, K and N a linear's inputs and outputs, T tokens:

    forwards   2 sides · 2 · P · T                                   shared by samples
    sums       3.2 · K² · T per stage (kernels/gram.py)              shared by samples
    rounding   32 · N · K² per linear: GPTQ and about 15 sweeps      shared by rows
    problem    2/3 · K³ per damping that is tried (three, then one more) and per factor (two), and 7/3 · K³ for their
               columns, per stage                                    shared by dampings, factors, 512 columns
    alone      20 · K² per stage: sums added, mirrored, damped       by the driver
    moved      K² · (26 · shards / workers + 21 / workers + 97) bytes per stage through a node's link to the shared
               folder: its shards' sums written, strips of all sums read, their total written; by the driver the totals
               read, what is tried, factored, solved and rounded with written; by every node all of that read

Shared work ends when the worker with most parts ends: a shard has 16 samples, or a sixteenth of more than 256; a part
of a weight at most 512 rows.  What bounds the gain are links, and dampings that wait for each other.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

SHARD, SHARDS, ROWS, COLUMNS = 16, 16, 512, 512


@dataclass(frozen=True)
class Shape:
    """A block: width, inner width, share of the width that keys and values have, and how many blocks."""

    name: str
    width: int
    inner: int
    kv: float
    blocks: int

    def stages(self) -> list[tuple[int, list[int]]]:
        """Inputs of every stage, and outputs of its linears."""
        keys = int(self.width * self.kv)
        return [
            (self.width, [self.width, keys, keys]), (self.width, [self.width]),
            (self.width, [self.inner, self.inner]), (self.inner, [self.width]),
        ]  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Seconds of a block."""

    shared: float
    alone: float
    moved: float

    @property
    def all(self) -> float:
        """Of all kinds."""
        return self.shared + self.alone + self.moved


def block(
    shape: Shape, samples: int, length: int, workers: int, flops: float, network: float, memory: float = 1e9
) -> Cost:
    """What a block costs.

    Args:
        shape: of the model.
        samples: calibration samples.
        length: tokens of each.
        workers: how many, one per node.
        flops: a worker's, per second.
        network: bytes per second between a node and the shared folder; math.inf on one machine.
        memory: values per second that a process reads and writes in plain loops.
    """
    parts = min(SHARDS, math.ceil(samples / SHARD))
    most = math.ceil(parts / workers) / parts * samples * length  # tokens of the worker that has most
    shared = alone = moved = 0.0
    for inputs, outputs in shape.stages():
        rows = sum(math.ceil(rows / ROWS) for rows in outputs)
        most_rows = min(sum(outputs), math.ceil(rows / workers) * ROWS)
        shared += (4 * inputs * sum(outputs) + 3.2 * inputs**2) * most / flops + 32 * most_rows * inputs**2 / flops
        columns = math.ceil(inputs / COLUMNS)
        factors = math.ceil(3 / workers) + 1 + math.ceil(2 / workers)
        shared += (2 / 3 * factors + 7 / 3 * math.ceil(columns / workers) / columns) * inputs**3 / flops
        alone += 20 * inputs**2 / memory
        moved += (26 * parts / workers + 21 / workers + 97) * inputs**2 / network
    return Cost(shared, alone, moved if workers > 1 else 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", type=float, default=2e12, help="of a worker, per second (a node of 64 cores: 2e12)")
    parser.add_argument("--network", type=float, default=3e9, help="bytes per second and node (25 Gbit/s: 3e9)")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--shape", help="width,inner,blocks in place of the two models")
    options = parser.parse_args()
    shapes = [Shape("8B", 4096, 14336, 0.25, 32), Shape("70B", 8192, 28672, 0.125, 80)]
    if options.shape:
        width, inner, blocks = map(int, options.shape.split(","))
        shapes = [Shape(options.shape, width, inner, 1.0, blocks)]
    print(
        f"{'model':>6} {'workers':>7} {'shared s':>9} {'driver s':>9} {'moved s':>8} {'all blocks':>11} {'of ideal':>9}"
    )
    for shape in shapes:
        first = block(shape, options.samples, options.length, 1, options.flops, options.network).all
        for workers in (1, 2, 4, 8, 16):
            cost = block(shape, options.samples, options.length, workers, options.flops, options.network)
            whole = cost.all * shape.blocks
            print(
                f"{shape.name:>6} {workers:>7} {cost.shared:>9.1f} {cost.alone:>9.1f} {cost.moved:>8.1f} "
                f"{whole / 60:>7.0f} min {first / workers / cost.all:>8.0%}"
            )


if __name__ == "__main__":
    main()
