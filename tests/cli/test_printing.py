"""What a stranger wrote into a folder is printed as text: no markup, no escape sequences."""

from __future__ import annotations

import io
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from roundexport.cli import printing
from roundexport.verification.report import EncoderQuality, Figure, QualityReport


def test_a_layer_named_like_markup_or_an_escape_sequence_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    printing.table([{"layer": "a[/b]", "[red]x": "\x1b[31mred\x1b[0m\u202e"}], "[bold]title")
    printing.line("name \x1b]0;evil\x07")
    out = capsys.readouterr().out
    assert "a[/b]" in out and "[red]x" in out and "[bold]title" in out
    assert r"\x1b[31mred\x1b[0m\u202e" in out and "\x1b" not in out and "\x07" not in out


def test_a_stdout_that_knows_ascii_only_still_gets_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    printing.survive_narrow_encodings()
    printing.line("  KL(float ‖ package)  mean 0.062 nats")
    narrow.flush()
    assert narrow.buffer.getvalue() == b"  KL(float ? package)  mean 0.062 nats\n"  # type: ignore[attr-defined]


def test_the_command_for_a_package_of_images_stands_in_a_shell_whatever_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / 'my "own" dog\'s $HOME'
    told = SimpleNamespace(task="embed_image")
    monkeypatch.setattr("roundexport.formats.package.read_package", lambda *_, **__: told)
    python, flag, code = shlex.split(printing._command(folder))
    assert (python, flag) == ("python", "-c")
    assert repr(str(folder)) in code and compile(code, "command", "exec")


def test_threads_are_printed_with_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    quality = EncoderQuality(8, Figure(1.0, 0.0), 1.0, 1.0, 1.0)
    report = QualityReport("p", "m", "text", {"engine": "ov", "threads": 3}, quality, None, ())
    printing.qualities({"p": report})
    assert "on ov, 3 threads, held-out text: text" in capsys.readouterr().out
