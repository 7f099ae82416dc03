"""Time and peak memory of an export: export_cost.py ARTIFACT OUT TARGET [options of roundexport export].

For the shapes of Qwen3-0.6B take the artifact that samples/bench_vendor_onnx.py leaves in its work folder.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from roundexport.runtime.machine import machine_info


def main() -> None:
    artifact, out, target, *options = sys.argv[1:]
    command = [str(Path(sys.executable).with_name("roundexport")), "export", artifact, out, "--to", target]
    began = time.perf_counter()
    subprocess.run([*command, *options], check=True, stdout=sys.stderr)
    seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"{target}: {seconds:.1f} s, peak RSS {peak:.0f} MiB")
    print(json.dumps(machine_info()))


if __name__ == "__main__":
    main()
