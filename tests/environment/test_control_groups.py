"""What control groups of either version leave to a process: CPU time and memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from control_group_toys import V1, V2, machine

from roundexport.environment.control_groups import cpu_quota, memory_free, memory_limit


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        (V2, {"pod/box/cpu.max": "100000 100000\n"}, 1.0),
        (V2, {"pod/box/cpu.max": "max 100000\n"}, None),
        (V2, {"pod/box/cpu.max": "max 100000\n", "pod/cpu.max": "250000 100000\n"}, 2.5),
        (V2, {"pod/box/cpu.max": "400000 100000\n", "pod/cpu.max": "150000 100000\n", "cpu.max": "max 1\n"}, 1.5),
        (V2, {"cpu.max": "200000 100000\n"}, 2.0),  # a container that does not see the folder of its own group
        ("0::/../../box\n", {"cpu.max": "50000 100000\n"}, 0.5),
        (V2, {"pod/box/cpu.max": "rubbish\n"}, None),
        (V2, {"pod/box/cpu.max": "100000 0\n"}, None),
        (V2, {}, None),
        ("", {}, None),
        (V1, {"cpu/pod/box/cpu.cfs_quota_us": "-1\n", "cpu/pod/box/cpu.cfs_period_us": "100000\n"}, None),
        (
            V1,
            {
                "cpu,cpuacct/pod/box/cpu.cfs_quota_us": "-1\n",
                "cpu,cpuacct/pod/box/cpu.cfs_period_us": "100000\n",
                "cpu,cpuacct/pod/cpu.cfs_quota_us": "300000\n",
                "cpu,cpuacct/pod/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        (V1 + V2, {"unified/pod/box/cpu.max": "100000 100000\n"}, 1.0),
    ],
)
def test_the_quota_is_the_least_of_the_hierarchy(
    tmp_path: Path, groups: str, files: dict[str, str], quota: float | None
) -> None:
    assert cpu_quota(machine(tmp_path, groups, files)) == quota


GIB = 2**30
V1_MEMORY = "memory/pod/box/memory"


@pytest.mark.parametrize(
    ("groups", "files", "limit", "free"),
    [
        (V2, {"pod/box/memory.max": f"{4 * GIB}\n", "pod/box/memory.current": f"{GIB}\n"}, 4, 3),
        (V2, {"pod/box/memory.max": "max\n", "pod/memory.max": f"{2 * GIB}\n", "pod/memory.current": "0\n"}, 2, 2),
        (V2, {"pod/memory.max": f"{8 * GIB}\n", "pod/box/memory.max": f"{6 * GIB}\n"}, 6, 6),
        (V2, {"memory.max": f"{GIB}\n", "memory.current": f"{2 * GIB}\n"}, 1, 0),
        (  # pages of files are taken back before anybody is killed
            V2,
            {
                "memory.max": f"{4 * GIB}\n",
                "memory.current": f"{4 * GIB}\n",
                "memory.stat": f"anon {GIB}\nactive_file {2 * GIB}\ninactive_file {GIB}\n",
            },
            4,
            3,
        ),
        (V2, {"pod/box/memory.max": f"{1024 * GIB}\n"}, None, 32),  # more than the machine has
        (V2, {"pod/box/memory.max": "max\n"}, None, 32),
        (V2, {"pod/box/memory.max": "rubbish\n"}, None, 32),
        ("", {}, None, 32),
        (V1, {"memory/pod/memory.limit_in_bytes": "9223372036854771712\n"}, None, 32),
        (
            V1,
            {
                "memory/pod/memory.limit_in_bytes": f"{4 * GIB}\n",
                "memory/pod/memory.usage_in_bytes": f"{3 * GIB}\n",
                "memory/pod/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}\n",
            },
            4,
            2,
        ),
    ],
)
def test_memory_is_what_the_groups_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], limit: int | None, free: int
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=32 * GIB))
    root = machine(tmp_path, groups, files)
    assert memory_limit(root) == (None if limit is None else limit * GIB)
    assert memory_free(root) == free * GIB
