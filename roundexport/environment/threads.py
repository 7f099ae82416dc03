"""How many threads to compute with: physical cores inside the affinity mask and the control group's CPU quota.

    count = OMP_NUM_THREADS, if the user set it
          = max(1, min(physical cores among the allowed CPUs, floor(quota)))       otherwise

A container usually sees every core of its host and is throttled once its threads together have used up their quota; a
pool of one thread per visible core then waits for itself, and throughput falls by an order of magnitude.  Libraries
look at the affinity mask at best, so this file looks at both, and tuning, verification, engines and benchmarks ask it.

- Physical cores: different (package, core) pairs of ``/sys/devices/system/cpu/cpu*/topology`` among the CPUs of the
  affinity mask; hyper-threads of one core count once.  Systems without those files: see `_allowed_elsewhere`.
- Quota: see control_groups.py.

Standard library only, so that it can be asked before numpy or torch start their threads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from roundexport.errors import UsageError

from .control_groups import cpu_quota

VARIABLE = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Threads:
    """A number of threads and where it comes from.

    Args:
        count: at least 1.
        reason: as in ``2 physical cores`` or ``OMP_NUM_THREADS``.
    """

    count: int
    reason: str

    def __str__(self) -> str:
        return f"{self.count} thread{'s' if self.count > 1 else ''} ({self.reason})"


def choose_threads(
    requested: int | None = None, environment: Mapping[str, str] | None = None, root: Path = Path("/")
) -> Threads:
    """Threads to compute with.

    Args:
        requested: the user's number; it wins.
        environment: variables of the process; None: ``os.environ``.
        root: where ``proc`` and ``sys`` are.

    Raises:
        UsageError: the user's number, or OMP_NUM_THREADS, is not a number of threads that this machine could use.
    """
    if requested is not None:
        return Threads(_checked(requested, "threads"), "as requested")
    text = (os.environ if environment is None else environment).get(VARIABLE, "").partition(",")[0].strip()
    if text:
        if not text.isdecimal():
            raise UsageError(f"{VARIABLE} must be a whole number, not {text!r}; unset it to use the machine's cores")
        return Threads(_checked(int(text), VARIABLE), VARIABLE)
    cores, quota = allowed_cores(root), cpu_quota(root)
    if quota is None or quota >= cores:
        return Threads(cores, f"{cores} physical core{'s' if cores > 1 else ''}")
    return Threads(max(1, int(quota)), f"CPU quota of {quota:g} on {cores} physical cores")


def _checked(count: int, name: str) -> int:
    most = max(64, 4 * (os.cpu_count() or 1))
    if not 1 <= count <= most:
        raise UsageError(f"{name} must be from 1 to {most} on this machine, not {count}")
    return count


def allowed_cores(root: Path = Path("/")) -> int:
    """Physical cores that the affinity mask leaves to this process."""
    affinity = getattr(os, "sched_getaffinity", None)
    if affinity is None:
        return _allowed_elsewhere()
    allowed: set[int] = affinity(0)
    cores = {_core(root / f"sys/devices/system/cpu/cpu{cpu}/topology", cpu) for cpu in allowed}
    return max(1, len(cores))


def _core(topology: Path, cpu: int) -> tuple[str, str]:
    """(package, core) of a CPU; where the system does not tell, the CPU is a core of its own."""
    try:
        return tuple((topology / name).read_text().strip() for name in ("physical_package_id", "core_id"))  # type: ignore[return-value]
    except OSError:
        return "", str(cpu)


def _allowed_elsewhere() -> int:
    """Every physical core: macOS and Windows have no mask to speak of."""
    import psutil

    return psutil.cpu_count(logical=False) or os.cpu_count() or 1
