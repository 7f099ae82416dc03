"""What a stranger wrote into a folder is printed as text: no markup, no escape sequences."""

from __future__ import annotations

import io
import sys

import pytest

from roundexport.cli import printing


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
