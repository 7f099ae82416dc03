"""One tuning run by one process, and by workers of this machine: the same bytes, and who computed how long.

    python samples/cluster/scaling.py                                   the sample model, 1 and 2 workers
    python samples/cluster/scaling.py --model MODEL --workers 1,2,4 --num-samples 128 --sample-len 512

CPU seconds of the driver (this process) and of the workers are told apart.  They do not depend on what else the machine
does, as wall time does: what W workers could gain at best is (driver + workers) / (driver + workers / W).
"""

from __future__ import annotations

import argparse
import hashlib
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
    print(f"{'run':>9} {'wall s':>8} {'driver CPU s':>13} {'workers CPU s':>14} {'at best':>8}  bytes")
    expected = None
    with tempfile.TemporaryDirectory() as folder:
        roundexport.tune(options.model, Path(folder) / "warm", settings, progress=False)  # compiled kernels, caches
        for count in (0, *map(int, options.workers.split(","))):
            before, since = cpu(), time.monotonic()
            out = Path(folder) / str(count)
            cluster = f"local:{count}" if count else None
            roundexport.tune(options.model, out, settings, cluster=cluster, progress=False)
            driver, workers = (now - then for now, then in zip(cpu(), before, strict=True))
            found = digest(out)
            expected = expected or found
            best = (driver + workers) / (driver + workers / count) if count else 1.0
            print(
                f"{cluster or 'alone':>9} {time.monotonic() - since:>8.1f} {driver:>13.1f} {workers:>14.1f} "
                f"{best:>7.2f}x  {'the same' if found == expected else 'OTHERS'}",
                flush=True,
            )
    if expected is None or found != expected:
        raise SystemExit(1)


def cpu() -> tuple[float, float]:
    """CPU seconds of this process, and of its children that have ended."""
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
