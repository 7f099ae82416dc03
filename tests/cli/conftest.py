"""Fixtures of the command line's tests: `run` in this process, one artifact and its packages for all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_tools import Run

from roundexport.cli.app import main


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run("inspect", path)`` gives (exit code, stdout, stderr)."""

    def call(*args: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["roundexport", *map(str, args)])
        code: int | str | None = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        out = capsys.readouterr()
        return int(code or 0), out.out, out.err

    return call


@pytest.fixture
def little_text(heldout_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out text of a few windows; `verify` draws 32 samples from the model where no text is given."""
    path = tmp_path_factory.mktemp("text") / "little.txt"
    path.write_text(heldout_text.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def artifact(packages: Callable[[str, str], tuple[Path, Path]]) -> Path:
    """A 4-bit artifact of the tiny Llama; not to be changed."""
    return packages("llama", "onnx")[0]


@pytest.fixture(scope="session")
def package(packages: Callable[[str, str], tuple[Path, Path]]) -> Callable[[str], Path]:
    """``package("onnx")`` is the artifact's package, made once a session; not to be changed."""
    return lambda target: packages("llama", target)[1]
