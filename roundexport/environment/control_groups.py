"""What control groups leave this process of its machine: CPU time and memory.

    CPUs' worth of time    least of quota / period          of the process's group and of every group above it
    memory that it holds   least of the limits, where that is less than the machine has
    memory that is free    least of what the system calls available, and limit - (used - cached pages of files)

A container sees its host's processors and memory, so libraries that ask the system plan for a machine that is not
theirs: threads wait for their quota, and what takes more memory than the limit is killed.

- Version 2: ``cpu.max`` ("quota period" or "max period"); ``memory.max`` (bytes or "max"), ``memory.current``, and the
  lines ``active_file`` and ``inactive_file`` of ``memory.stat``, which the kernel takes back before it kills.
- Version 1: ``cpu.cfs_quota_us`` / ``cpu.cfs_period_us`` (-1: none); ``memory.limit_in_bytes`` (huge: none),
  ``memory.usage_in_bytes``, ``total_active_file`` and ``total_inactive_file``.

A container may not see the folder that ``/proc/self/cgroup`` names; the mount's root is then its own group and is
always read.  Standard library only, but for the memory of the machine, so that threads can be asked for before numpy or
torch start theirs.

Source: https://docs.kernel.org/admin-guide/cgroup-v2.html, "CPU Interface Files", "Memory Interface Files";
https://docs.kernel.org/scheduler/sched-bwc.html; https://docs.kernel.org/admin-guide/cgroup-v1/memory.html.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

_V1_MOUNTS = {"cpu": ("cpu", "cpu,cpuacct", "cpuacct,cpu"), "memory": ("memory",)}
_V2_MOUNTS = ("", "unified")
_ROOT = Path("/")


def cpu_quota(root: Path = _ROOT) -> float | None:
    """CPUs' worth of time that the control groups grant this process: the least of the hierarchy; None: no limit."""
    quotas = [_quota_v2(folder) if unified else _quota_v1(folder) for unified, folder in _groups("cpu", root)]
    return min((quota for quota in quotas if quota is not None), default=None)


def memory_limit(root: Path = _ROOT) -> int | None:
    """Bytes that the control groups let this process hold: the least of the hierarchy; None: all that there is."""
    import psutil

    limits = [limit for limit, _ in _memory(root)]
    return min((limit for limit in limits if limit < psutil.virtual_memory().total), default=None)


def memory_free(root: Path = _ROOT) -> int:
    """Bytes that this process can still take, of the machine and of its control groups."""
    import psutil

    available: int = psutil.virtual_memory().available
    return max(0, min([available, *(limit - used for limit, used in _memory(root))]))


def _memory(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of the groups that have a limit, in bytes."""
    for unified, folder in _groups("memory", root):
        names = ("memory.max", "memory.current") if unified else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (_read(folder / name) for name in names)
        if limit.isdecimal():
            counted = int(used) if used.isdecimal() else 0
            yield int(limit), max(0, counted - _cached(folder / "memory.stat", "" if unified else "total_"))


def _cached(stat: Path, prefix: str) -> int:
    """Bytes of files' pages."""
    wanted = (f"{prefix}active_file", f"{prefix}inactive_file")
    lines = (line.split() for line in _read(stat).splitlines())
    return sum(int(words[1]) for words in lines if len(words) == 2 and words[0] in wanted and words[1].isdecimal())


def _groups(controller: str, root: Path) -> Iterator[tuple[bool, Path]]:
    """Folders of the groups that this process is in, and whether they are of version 2."""
    try:
        entries = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        entries = []
    mount = root / "sys/fs/cgroup"
    for _, controllers, path in (entry for entry in entries if len(entry) == 3):
        if controllers == "":
            yield from ((True, folder) for name in _V2_MOUNTS for folder in _upwards(mount / name, path))
        elif controller in controllers.split(","):
            yield from ((False, folder) for name in _V1_MOUNTS[controller] for folder in _upwards(mount / name, path))


def _upwards(mount: Path, path: str) -> Iterable[Path]:
    """A group's folder and those above it, the mount's root last; ``..`` leads outside it and is not followed."""
    parts = [part for part in path.split("/") if part]
    if ".." in parts:
        parts = []
    return (mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1))


def _quota_v2(folder: Path) -> float | None:
    return _ratio(_read(folder / "cpu.max").split())


def _quota_v1(folder: Path) -> float | None:
    return _ratio([_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")])


def _ratio(words: list[str]) -> float | None:
    if len(words) != 2 or not all(word.isdecimal() for word in words) or int(words[1]) == 0:
        return None  # "max", -1, no file
    return int(words[0]) / int(words[1])


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
