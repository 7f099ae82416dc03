"""The first blocks alone: kept results compared with the first N blocks quantized and all others float.

    python samples/compare_tuners/first_blocks.py --model M --blocks 10 results/4-64-sym-default-0-… results/4-64-…

For a rival that takes hours: tuners that go from block to block choose a block's weights from the blocks before it
alone, so those of the first N are what a run that stops there would have.  auto-round's are there while it still runs
(see auto_round_side.py).  Where a result changed anything but weights of linears, it cannot be taken apart.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from compare import SAMPLES
from evaluate import Evaluator, block_linears, put, ratio, read

from roundexport.calibration.samples import ids_digest, load_calibration
from roundexport.model.blocks import find_stack
from roundexport.model.checkpoint import Checkpoint


def within(names: set[str], blocks: list[str]) -> set[str]:
    """Those of modules that lie in one of the blocks."""
    return {name for name in names if any(name.startswith(f"{block}.") for block in blocks)}


def part(folder: Path, blocks: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, int]]]:
    """Tensors and layers of the first blocks, of a finished result or of one that still runs."""
    if (folder / "report.json").exists():
        tensors, layers = read(folder)
        if {f"{name}.weight" for name in layers} != set(tensors):
            sys.exit(f"{folder} holds more than weights of linears; only whole results like it can be compared")
    else:
        tensors, layers = {}, {}
        for block in blocks:
            some, stored = read(folder / "blocks" / block)
            tensors |= some
            layers |= stored
    wanted = within(set(layers), blocks)
    return {f"{name}.weight": tensors[f"{name}.weight"] for name in wanted}, {name: layers[name] for name in wanted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="folders that compare.py --keep made")
    parser.add_argument("--model", required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--text", default=str(SAMPLES / "text" / "heldout.txt"))
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint = Checkpoint.open(options.model)
    held_out = load_calibration(checkpoint, options.text).ids[: options.windows]
    kept = options.results[0].parent / f"float-{checkpoint.digest[:10]}-{ids_digest(held_out)[:10]}.npy"
    evaluator = Evaluator(checkpoint, held_out, kept)
    first = None
    for folder in options.results:
        model = checkpoint.load_model()
        stack = find_stack(model)
        blocks = [stack.block_name(index) for index in range(options.blocks)]
        tensors, layers = part(folder, blocks)
        put(model, tensors, set(layers), within(block_linears(model), blocks))
        figures = evaluator.compare(model, layers)
        first = first or figures
        told, (times, error) = figures.to_json(), ratio(figures, first)
        print(
            f"{folder.name}: {told['bits_per_weight']:.3f} bits, KL {told['kl']:.5f} ± {told['kl_se']:.5f}, "
            f"of the first {times:.3f} ± {error:.3f}, top-1 {told['top1']:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
