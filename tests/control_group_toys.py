"""Root folders of machines that have control groups and CPUs as a test says."""

from __future__ import annotations

from pathlib import Path

V2 = "0::/pod/box\n"
V1 = "3:memory:/pod\n2:cpu,cpuacct:/pod/box\n0::/\n"


def machine(root: Path, groups: str, files: dict[str, str], cores: dict[int, tuple[int, int]] | None = None) -> Path:
    """A root folder with control groups and CPUs (CPU -> package and core)."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for cpu, (package, core) in (cores or {}).items():
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{package}\n")
        (topology / "core_id").write_text(f"{core}\n")
    return root
