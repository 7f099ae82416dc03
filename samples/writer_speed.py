"""Who writes a model's calibration text how fast: the model in torch, and its 8-bit package for each target.

    OMP_NUM_THREADS=1 python samples/writer_speed.py MODEL --num-samples 22 --sample-len 512

Prints processor seconds of writing all the samples in full, from the first token to the last position, so that what
attention takes at long positions is in them; making the package is a line of its own.
"""

from __future__ import annotations

import argparse
import time

from roundexport import Checkpoint
from roundexport.calibration.self_generated import beginnings, write_samples
from roundexport.conversion.package_writer import PackageWriter
from roundexport.model.torch_threads import torch_threads


def main() -> None:
    """Time every writer once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--num-samples", type=int, default=22)
    parser.add_argument("--sample-len", type=int, default=512)
    parser.add_argument("--writers", default="openvino,onnx,torch")
    given = parser.parse_args()
    checkpoint, size = Checkpoint.open(given.model), (given.num_samples, given.sample_len)
    begun = beginnings(checkpoint, *size)
    for target in [name for name in given.writers.split(",") if name != "torch"]:
        marks: list[float] = []

        def report(share: float, _: str, marks: list[float] = marks) -> None:
            marks.extend([time.process_time()] * (not marks or (share > 0 and len(marks) == 1)))

        PackageWriter(target)(checkpoint, begun, given.sample_len, 42, report)
        told(f"8-bit package for {target}, making it", marks[1] - marks[0], *size)
        told(f"8-bit package for {target}", time.process_time() - marks[1], *size)
    if "torch" not in given.writers:
        return
    model = checkpoint.load_model()
    with torch_threads():
        since = time.process_time()
        write_samples(model, checkpoint, begun, given.sample_len, 42)
        told("torch float32", time.process_time() - since, *size)


def told(what: str, seconds: float, samples: int, length: int) -> None:
    """Print a line of the table."""
    print(f"{what:45} {seconds:7.1f} s  {1e3 * seconds / (samples * length):6.2f} ms per token", flush=True)


if __name__ == "__main__":
    main()
