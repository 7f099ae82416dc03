"""One tuning run by one process, and by workers of this machine: the same bytes, and who computed how long.

    python samples/cluster/scaling.py                                   the sample model, 1 and 2 workers
    python samples/cluster/scaling.py --model MODEL --workers 1,2,4 --num-samples 128 --sample-len 512

CPU seconds of the driver (this process), of starting the workers (each imports torch and transformers) and of their
work are told apart.  They depend less than wall time on what else the machine does.  With W workers that each have a
core and nothing else to do a run would take driver + work / W seconds; "gain" is how often that goes into the CPU
seconds of one process alone.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import roundexport

SAMPLES = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SAMPLES / "model"))
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--sample-len", type=int, default=256)
    options = parser.parse_args()
    settings = roundexport.TuneSettings(
        calibration=str(SAMPLES / "text" / "calibration.txt"),
        num_samples=options.num_samples,
        sample_len=options.sample_len,
    )
    begun = starting()
    heads = f"{'driver CPU s':>13} {'start CPU s':>12} {'work CPU s':>11} {'gain':>8}  bytes"
    print(f"{'run':>9} {'wall s':>8} {heads}")
    expected, alone = None, 0.0
    with tempfile.TemporaryDirectory() as folder:
        roundexport.tune(SAMPLES / "model", Path(folder) / "warm", settings, progress=False)  # compiled kernels, caches
        for count in (0, *map(int, options.workers.split(","))):
            before, since = cpu(), time.monotonic()
            out = Path(folder) / str(count)
            cluster = f"local:{count}" if count else None
            roundexport.tune(options.model, out, settings, cluster=cluster, progress=False)
            driver, workers = (now - then for now, then in zip(cpu(), before, strict=True))
            found = digest(out)
            expected = expected or found
            start, work = begun * count, max(0.0, workers - begun * count)
            alone = alone or driver
            gain = alone / (driver + work / count) if count else 1.0
            print(
                f"{cluster or 'alone':>9} {time.monotonic() - since:>8.1f} {driver:>13.1f} {start:>12.1f} "
                f"{work:>11.1f} {gain:>7.2f}x  {'the same' if found == expected else 'OTHERS'}",
                flush=True,
            )
    if expected is None or found != expected:
        raise SystemExit(1)


def starting() -> float:
    """CPU seconds of a worker that does nothing."""
    from roundexport.cluster.opening import open_cluster  # brings torch, which --help does not need

    before = cpu()[1]
    with open_cluster("local:1"):
        pass
    return cpu()[1] - before


def cpu() -> tuple[float, float]:
    """CPU seconds of this process, and of its children that have ended."""
    multiprocessing.active_children()  # collects those that have
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own, children = (one.ru_utime + one.ru_stime for one in used)
    return own, children


def digest(folder: Path) -> str:
    """Of all files of an artifact."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


if __name__ == "__main__":
    main()
