"""Resident memory of a process and whatever it has started, as the system counts it; shared pages count in each."""

from __future__ import annotations

from pathlib import Path


def tree_rss(pid: int, *, peak: bool = False) -> int:
    """Resident bytes of a process and its children, now or at most so far; 0 once it has gone.

    Linux keeps each process's peak, so nothing need sample memory while times are taken; elsewhere the peak is what is
    resident now.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        tree = [process, *process.children(recursive=True)]
        return sum((peak and _high_water(p.pid)) or p.memory_info().rss for p in tree)
    except psutil.NoSuchProcess:
        return 0


def _high_water(pid: int) -> int:
    path = Path(f"/proc/{pid}/status")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
