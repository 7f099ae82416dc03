"""What a tuner's process takes: CPU seconds, wall clock and peak memory, with the processor they were measured on."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from roundexport.runtime.machine import instruction_sets

# A process begins with the peak memory of the one that starts it, which here holds a model's answers: a small one does.
_LAUNCHER = """
import json, os, subprocess, sys, time
since = time.monotonic()
process = subprocess.Popen(sys.argv[2:])
_, status, used = os.wait4(process.pid, 0)
found = {"exit": os.waitstatus_to_exitcode(status), "cpu_s": used.ru_utime + used.ru_stime,
         "wall_s": time.monotonic() - since, "peak_kib": used.ru_maxrss}
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
"""


class TunerError(Exception):
    """A tuner's process ended with an error."""


@dataclass(frozen=True)
class Cost:
    """What a run took: CPU seconds (user + system), wall seconds, peak resident memory in GiB, and where it ran."""

    cpu_s: float
    wall_s: float
    peak_gib: float
    threads: int
    instruction_set: str


def measured(line: list[str], threads: int) -> Cost:
    """Run a command with a number of threads; what it and its children took.

    Raises:
        TunerError: it ended with an error; the text is the end of what it printed.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
    with tempfile.TemporaryDirectory() as scratch:
        log, answer = Path(scratch, "log"), Path(scratch, "answer.json")
        with log.open("wb") as written:
            launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(answer), *line]
            launched = subprocess.run(launcher, env=environment, stdout=written, stderr=written, check=False)
        found = json.loads(answer.read_text()) if launched.returncode == 0 else {"exit": launched.returncode}
        if found["exit"]:
            raise TunerError(log.read_text(errors="replace")[-3000:])
    place = (instruction_sets() or ("unknown",))[-1]
    return Cost(found["cpu_s"], found["wall_s"], found["peak_kib"] / 2**20, threads, place)


def median_cost(costs: Sequence[Cost]) -> Cost:
    """Median of each number over runs on one machine."""
    each = {name: statistics.median(getattr(cost, name) for cost in costs) for name in ("cpu_s", "wall_s", "peak_gib")}
    return replace(costs[0], **each)
