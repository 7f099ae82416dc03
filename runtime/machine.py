"""The machine that a figure was measured on: processor, instruction sets, versions, and how fast memory is read.

Which runtime and which scheme is fastest turns round with the instruction set (AVX2 alone, or AVX-512 with VNNI, or
AMX), so every record of a benchmark carries this.  A decode step reads all weights once; the measured read bandwidth
is therefore its ceiling:

    tokens per second ≤ bandwidth / bytes of weights          mbu = bytes · tokens per second / bandwidth

Bandwidth is measured as STREAM does it, with reads only: one array per thread, far larger than the caches together,
best of several passes.  ``numpy.max`` over bytes does one vector instruction per load and leaves the interpreter's
lock.
"""

from __future__ import annotations

import importlib.util
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from roundexport.environment.control_groups import cpu_quota
from roundexport.environment.openvino_import import import_openvino
from roundexport.environment.threads import allowed_cores
from roundexport.environment.versions import installed_versions

# Flag in /proc/cpuinfo -> what it is called here; the list is in order of age.
_INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX-512-VNNI",
    "avx512_bf16": "AVX-512-BF16",
    "amx_int8": "AMX-INT8",
    "amx_bf16": "AMX-BF16",
    "asimddp": "NEON-DOTPROD",
    "sve": "SVE",
}
_LIBRARIES = ("numpy", "onnxruntime", "onnxruntime-genai", "openvino", "openvino-genai", "tokenizers", "roundexport")


def instruction_sets() -> tuple[str, ...]:
    """Vector extensions that decide speed, oldest first; empty where the system (any but Linux) does not tell."""
    flags = set(f"{_cpuinfo('flags')} {_cpuinfo('Features')}".split())
    return tuple(name for flag, name in _INSTRUCTION_SETS.items() if flag in flags)


def machine_info() -> dict[str, Any]:
    """Processor, cores, memory, system, versions, and how busy the machine is, as JSON."""
    import psutil

    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "instruction_sets": list(instruction_sets()),
        "physical_cores": allowed_cores(),
        "cpu_quota": cpu_quota(),
        "logical_cores": psutil.cpu_count() or 1,
        "l3_mib": _l3_mib(),
        "load_1min": round(psutil.getloadavg()[0], 2),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": installed_versions(_LIBRARIES),
    }


def describe_devices() -> dict[str, str]:
    """Device name -> what it is; those of OpenVINO where it is installed, else the processor alone."""
    info = machine_info()
    cpu = f"{info['cpu']}, {info['physical_cores']} cores, {' '.join(info['instruction_sets']) or 'unknown extensions'}"
    if importlib.util.find_spec("openvino") is None:
        return {"CPU": cpu}
    core = import_openvino().Core()
    found = {name: str(core.get_property(name, "FULL_DEVICE_NAME")) for name in core.available_devices}
    return {**found, "CPU": cpu}


def read_bandwidth(threads: int, *, mib_per_thread: int = 128, seconds: float = 1.0) -> float:
    """Bytes per second that this many threads together read from memory, best of the passes that fit in ``seconds``."""
    arrays = [np.ones(mib_per_thread * 2**20, np.uint8) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        end = time.perf_counter() + seconds
        while best == 0 or time.perf_counter() < end:
            began = time.perf_counter()
            list(pool.map(np.max, arrays))
            best = max(best, sum(a.nbytes for a in arrays) / (time.perf_counter() - began))
    return best


def _cpuinfo(key: str) -> str:
    """First value of a key in /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return ""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _l3_mib() -> float | None:
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    return int(text[:-1]) / 1024 if text.endswith("K") and text[:-1].isdigit() else None
