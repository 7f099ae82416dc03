"""How much one decode step differs between sessions that are opened alike: memory lies elsewhere every time.

    python samples/session_luck.py PACKAGE [--sessions 6] [--steps 40]
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python samples/session_luck.py PACKAGE

Decoding reads all weights for every token, so it depends on how their pages lie in caches and in the look-up of
addresses, and that is settled when a package is opened.  Sessions take turns, step by step, in an order that is drawn;
one thread, its CPU time, so that other work on the machine counts little.  Rounds inside one process, and intervals
over them, do not see this spread.  The second line asks glibc (2.35 and later, Linux) for pages of 2 MiB.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import time
from pathlib import Path

import numpy as np

from roundexport.runtime import Decoder, load, machine_info

PROMPT = 128


def huge_mib() -> int:
    """Memory of this process in huge pages."""
    found = re.search(r"AnonHugePages:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text())
    return int(found[1]) // 1024 if found else 0


def main() -> None:
    """Open a package several times, time all of them in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package")
    parser.add_argument("--sessions", type=int, default=6)
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    random, steps = np.random.default_rng(0), []
    for _ in range(given.sessions):
        decoder = load(given.package, engine="ort", threads=1)
        assert isinstance(decoder, Decoder), f"{given.package} is an encoder"
        session = decoder.start(expected=PROMPT + given.steps)
        [row] = session.add()
        session.extend({row: random.integers(3, 250, PROMPT).tolist()})
        steps.append((session, row, []))
    for _ in range(given.steps):
        for at in random.permutation(given.sessions):
            session, row, times = steps[at]
            began = time.thread_time()
            session.extend({row: [5]})
            times.append(1000 * (time.thread_time() - began))
    machine, tunables = machine_info(), os.environ.get("GLIBC_TUNABLES", "no tunables")
    medians = sorted(statistics.median(times) for _, _, times in steps)
    print(f"{machine['cpu']}, {' '.join(machine['instruction_sets'])}, 1 thread, {tunables}, {huge_mib()} MiB huge")
    print(f"ms per step of {given.sessions} sessions: {', '.join(f'{ms:.2f}' for ms in medians)}")


if __name__ == "__main__":
    main()
