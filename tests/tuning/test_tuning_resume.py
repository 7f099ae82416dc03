"""Tuning killed with SIGKILL: whatever the moment, the next run gives the bytes of a run that was never killed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_tools import COMMAND
from warm_python import WarmPython

from roundexport.cli import main

Models = Callable[[str], Path]

# Runs `tune` again and again in forked children; the n-th child dies at the n-th of some points at which the disk is
# touched (write, flush, rename, remove).  One thread, so that forking is safe.
DRIVER = """
import gc, os, signal, sys, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[4])
from conftest import tuned
import roundexport.tuning
import roundexport.algorithms.rounding.signround
from roundexport.storage import safetensors_writer
import transformers.models.auto.modeling_auto, transformers.models.llama.modeling_llama  # so that no child need

model, work, stride = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
calls = 0

def quickly(out):
    tuned(model, out, group_size=32, num_samples=4, sample_len=16, steps=2, batch_size=2, progress=False)

quickly(work / "first")  # keeps the text it wrote for the children, which then touch the disk as often, and its imports
gc.collect()
gc.freeze()  # no child's collections look at what all of them have

def run(out, die_at=None):
    def deadly(function):
        def call(*args, **kwargs):
            global calls
            calls += 1
            if calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    child = os.fork()
    if child == 0:
        try:
            for name in ("fsync", "replace", "rename", "unlink", "rmdir", "posix_fallocate"):
                setattr(os, name, deadly(getattr(os, name)))
            safetensors_writer._write_at = deadly(safetensors_writer._write_at)
            quickly(out)
            (work / "calls").write_text(str(calls))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(child, 0)[1]

def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}

assert run(work / "expected") == 0
expected, total = contents(work / "expected"), int((work / "calls").read_text())
killed = resumed = 0
for die_at in range(1, total + 1, stride):
    out = work / f"out{die_at}"
    assert os.WIFSIGNALED(run(out, die_at)), die_at
    killed += 1
    if out.exists():  # renamed already, only the state's removal was cut off
        assert contents(out) == expected, die_at
        assert run(out) != 0 and not out.with_name(out.name + ".partial").exists(), die_at  # refused, and tidied up
        continue
    assert run(out) == 0, die_at
    resumed += 1
    assert contents(out) == expected, die_at
    assert not out.with_name(out.name + ".partial").exists(), die_at
print(total, killed, resumed)
"""


@pytest.mark.slow
def test_killed_at_any_touch_of_the_disk_the_next_run_gives_the_same_bytes(
    models: Models, tmp_path: Path, warm: WarmPython
) -> None:
    done = warm.run(DRIVER, models("llama"), tmp_path, "9", Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    total, killed, resumed = map(int, done.stdout.split())
    assert total > 60 and killed == len(range(1, total + 1, 9)) and resumed > killed // 2


@pytest.mark.slow
def test_killed_between_blocks_the_command_line_goes_on(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    warm: WarmPython,
) -> None:  # fmt: skip
    flags = ["--group-size", "32", "--num-samples", "8", "--sample-len", "64", "--steps", "40"]

    def here(out: Path) -> int | str | None:
        """The command in this process, which has torch already: its exit code."""
        monkeypatch.setattr(sys, "argv", ["roundexport", "tune", str(models("qwen3")), str(out), *flags])
        try:
            main()
        except SystemExit as stop:
            return stop.code
        return 0

    whole, out, state = tmp_path / "whole", tmp_path / "out", tmp_path / "out.partial" / "state.json"
    assert here(whole) in (0, None)
    process = warm.start(COMMAND, "tune", models("qwen3"), out, *flags)
    limit = time.monotonic() + 240
    while not (state.exists() and json.loads(state.read_text())["blocks_done"] == 1):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not out.exists()
    capfd.readouterr()
    assert here(out) in (0, None)
    assert "1 blocks done before" in capfd.readouterr().err.replace("\n", " ")
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in out.iterdir())
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in names)
