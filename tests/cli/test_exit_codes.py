"""Exit codes: a failed gate, a full disk, a kill, Ctrl-C, and exceptions that nobody expected."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_tools import COMMAND, Run, left_behind
from warm_python import WarmPython

from roundexport.storage import atomic


def test_a_failed_gate_exits_3_after_printing_the_figures(
    run: Run, package: Callable[[str], Path], models: Callable[[str], Path], tmp_path: Path
) -> None:
    own = shutil.copytree(package("onnx"), tmp_path / "package")  # `verify` keeps its record in it
    verify = ("verify", own, "--against", models("llama"), "--num-samples", "2", "--sample-len", "32")
    code, out, err = run(*verify, "--max-kl", "1e-9")
    assert code == 3 and "KL" in out and "above --max-kl" in err
    assert run(*verify, "--max-kl", "100", "--min-top1", "0")[0] == 0
    code, _, err = run(*verify, "--min-cosine", "0.9")
    assert code == 2 and "encoder" in err


def test_a_full_disk_exits_4_and_leaves_nothing(run: Run, artifact: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(atomic.os, "fsync", full)
    code, _, err = run("export", artifact, tmp_path / "out", "--to", "onnx")
    assert code == 4 and "out" in err
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_an_export_that_was_killed_starts_clean_and_gives_the_same_bytes(
    target: str, run: Run, artifact: Path, package: Callable[[str], Path], tmp_path: Path, warm: WarmPython
) -> None:
    whole, again = package(target), tmp_path / "again"
    killed = warm.start(COMMAND, "export", artifact, again, "--to", target)
    while not any(p.name.startswith(".again") and p.is_dir() and any(p.iterdir()) for p in tmp_path.iterdir()):
        assert killed.poll() is None, "it finished before anything was seen"
        time.sleep(0.005)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert not again.exists()
    code, _, err = run("export", artifact, again, "--to", target)
    assert code == 0, err
    assert left_behind(tmp_path) == ["again"]
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    for name in files:
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name


def test_any_other_exception_is_one_line_and_its_trace_comes_on_request(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("two\nlines \x1b[31m")

    monkeypatch.setattr("roundexport.conversion.inspection.inspect", broken)
    code, out, err = run("inspect", tmp_path)
    said = err.removeprefix(f"inspecting {tmp_path} …\n")
    assert (code, out) == (1, "") and said.count("\n") == 1 and "\x1b" not in said
    assert "unexpected ValueError: two lines" in err and "ROUNDEXPORT_TRACE=1" in err
    monkeypatch.setenv("ROUNDEXPORT_TRACE", "1")
    assert "Traceback" in run("inspect", tmp_path)[2]


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (MemoryError(), 4, "out of memory; use fewer samples"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), 4, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RecursionError("maximum recursion depth exceeded"), 1, "unexpected RecursionError"),
        (ModuleNotFoundError("No module named 'onnx'", name="onnx"), 1, "roundexport[export-onnx]"),
    ],
    ids=["memory", "torch's memory", "Ctrl-C", "recursion", "import"],
)
def test_failures_have_their_exit_codes(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException, code: int, text: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("roundexport.conversion.inspection.inspect", broken)
    assert run("inspect", tmp_path)[0] == code and text in run("inspect", tmp_path)[2]


def test_ctrl_c_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("roundexport.conversion.convert.convert_as", interrupted)
    code, _, err = run("convert", tmp_path, tmp_path / "out")
    assert code == 130 and "interrupted; finished parts are kept" in err and "same command again" in err
