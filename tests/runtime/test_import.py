"""`import roundexport.runtime` is quick: little is read before something is done."""

from __future__ import annotations

import json
import subprocess
import sys

_CODE = """
import json, sys, time
import {}
print(json.dumps([time.process_time(), sorted({{name.partition(".")[0] for name in sys.modules}})]))
"""
_NEEDED = "numpy, tokenizers"  # nothing of the runtime works without
_MOST = 4.0  # times as long as these and the interpreter; 2.6 when it was written
_LATER = {"torch", "transformers", "onnxruntime", "openvino", "jinja2", "psutil", "filelock", "starlette", "PIL"}


def started(modules: str) -> tuple[float, set[str]]:
    """Processor time of a fresh process that imports modules, and all that it has imported."""
    command = [sys.executable, "-P", "-c", _CODE.format(modules)]
    seconds, found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return seconds, set(found)


def test_the_runtime_takes_little_longer_than_what_it_cannot_do_without() -> None:
    """By processor time beside that of the same machine in the same moment, best of three: machines differ."""
    found = []
    for _ in range(3):
        seconds, modules = started("roundexport.runtime")
        assert not _LATER & modules
        found.append(seconds / started(_NEEDED)[0])
        if found[-1] < _MOST:
            break
    assert min(found) < _MOST, found
