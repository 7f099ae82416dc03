"""What other systems lack is not needed: modules and functions of POSIX are taken away, and everything still runs.

This is no substitute for a run on Windows; it shows that nothing is imported or called that is not there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from warm_python import WarmPython

from conftest import ROOT

GOLDEN = ROOT / "tests" / "golden"

BLOCK = """
import os, sys
import psutil  # has a file of its own for every system
for name in ("fcntl", "resource", "pwd", "grp"):
    sys.modules[name] = None
import mmap
for module, names in {
    os: ("posix_fallocate", "posix_fadvise", "pread", "pwrite", "preadv", "pwritev", "sched_getaffinity", "sysconf",
         "getuid", "geteuid", "fork", "register_at_fork", "O_DIRECTORY", "O_NOFOLLOW"),
    mmap: ("MADV_DONTNEED",),
}.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
original = os.open
def open_no_folder(path, flags, *args, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return original(path, flags, *args, **kwargs)
os.open = open_no_folder
import shutil
shutil._use_fd_functions = False  # as on Windows
"""


def run(code: str, *arguments: str, options: tuple[str, ...] = (), cwd: Path = Path("/")) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", code, *arguments],
        check=False, capture_output=True, text=True, cwd=cwd, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


def test_the_runtime_imports_and_opens_packages_without_posix() -> None:
    code = """
from roundexport.runtime import load
for target in ("onnx", "openvino"):
    decoder = load(os.path.join(sys.argv[1], target), precise=True)
    print(decoder.greedy([[5, 9, 200, 33, 17, 4, 350, 8]], 2)[0].tolist())
"""
    assert run(BLOCK + code, str(GOLDEN)) == "[86, 192]\n[86, 192]"


def test_tuning_and_export_run_without_posix(warm: WarmPython, tmp_path: Path) -> None:
    """torch and transformers are imported before: they know their way around on every system."""
    work = """
import roundexport
from roundexport import TuneSettings
from roundexport.formats.package import read_package
model, text, out = sys.argv[1:]
settings = TuneSettings(algorithm="gram", bits=4, group_size=32, calibration=text, num_samples=2, sample_len=16)
roundexport.tune(model, out + "/artifact", settings, progress=False)
for target in ("onnx", "openvino"):
    roundexport.export(out + "/artifact", out + "/" + target, to=target)
    print(len(read_package(out + "/" + target).layers))
print(sorted(os.listdir(out)))
"""
    text = str(ROOT / "samples" / "text" / "calibration.txt")
    done = warm.run(BLOCK + work, GOLDEN / "model", text, tmp_path, cwd="/")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-3:] == ["16", "16", "['artifact', 'onnx', 'openvino']"]


def test_a_checkout_that_shadows_an_installed_copy_is_whole() -> None:
    """Python started in the root finds the checkout first; `runtime/` and `kernels/` belong to it there too."""
    others = [path for path in sys.path if path and Path(path).resolve() != ROOT]  # an environment may lie inside
    code = f"""
import sys
sys.path[:] = ["", *{others!r}]
import roundexport.runtime, roundexport.kernels
print(roundexport.runtime.__file__)
print(roundexport.kernels.__file__)
"""
    found = run(code, options=("-S",), cwd=ROOT).splitlines()  # -S: no .pth file, so no editable installation
    assert found == [str(ROOT / folder / "__init__.py") for folder in ("runtime", "kernels")]
