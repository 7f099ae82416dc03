"""What a tuner's process takes: CPU seconds, wall clock and peak memory, with the processor they were measured on."""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from roundexport.runtime.machine import instruction_sets


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
    since = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(line, env=environment, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            log.seek(0)
            raise TunerError(log.read().decode(errors="replace")[-3000:])
    return Cost(
        used.ru_utime + used.ru_stime,
        time.monotonic() - since,
        used.ru_maxrss / 2**20,
        threads,
        (instruction_sets() or ("unknown",))[-1],
    )


def median_cost(costs: Sequence[Cost]) -> Cost:
    """Median of each number over runs on one machine."""
    each = {name: statistics.median(getattr(cost, name) for cost in costs) for name in ("cpu_s", "wall_s", "peak_gib")}
    return replace(costs[0], **each)
