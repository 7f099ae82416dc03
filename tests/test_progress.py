"""What is shown while something runs: a line as it begins, one when due, the time left; nothing on stdout."""

from __future__ import annotations

import io
import re
import sys
import time
from contextlib import redirect_stderr

import pytest

from roundexport.progress import Progress, Stage, duration, passed


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("share", "elapsed", "seconds", "expected"),
    [
        (None, 5, None, "s: 5 s"),
        (None, 5, 20, "s: 5 s, about 15 s left"),
        (None, 30, 20, "s: 30 s, about 0 s left"),
        (0.25, 10, 500, "s: 25 %, 10 s, about 30 s left"),
        (0.001, 10, 50, "s: 0 %, 10 s, about 40 s left"),
        (2.0, 10, None, "s: 100 %, 10 s, about 0 s left"),
    ],
)
def test_a_stage_says_how_far_it_is(share: float | None, elapsed: float, seconds: float | None, expected: str) -> None:
    clock = Clock()
    stage = Stage("s", seconds, clock)
    clock.now += elapsed
    if share is not None:
        stage.at(share)
    assert stage.describe() == expected


def test_getting_ready_is_not_extrapolated() -> None:
    clock = Clock()
    stage = Stage("s", None, clock)
    clock.now += 100
    stage.at(0.1)
    clock.now += 10
    stage.at(0.3)
    assert stage.left == pytest.approx(35)


def test_a_line_comes_when_a_stage_begins_and_whenever_one_is_due(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    shown = Progress(interval=8, clock=clock)
    with shown.stage("reading") as stage:
        shown.tick()
        clock.now += 9
        stage.at(0.5, "part 2")
        shown.tick()
        shown.tick()
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.splitlines() == ["reading …", "reading: 50 %, 9 s, about 9 s left (part 2)", "reading: 9.0 s"]


def test_work_that_reports_nothing_is_not_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(interval=0.05) as shown, shown.stage("[waiting]"):
        time.sleep(0.4)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[waiting] …" and len(lines) >= 3


def test_work_that_hides_what_libraries_print_hides_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    hidden = io.StringIO()
    with Progress(interval=0.05) as shown, shown.stage("tracing"), redirect_stderr(hidden):
        print("a library's own words", file=sys.stderr)
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3 and hidden.getvalue() == "a library's own words\n"


def test_what_is_not_enabled_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(enabled=False) as shown, shown.stage("x"):
        shown.say("y")
        shown.table([{"a": 1}])
    assert capsys.readouterr() == ("", "")


def test_one_report_is_shared_by_all_parts(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as shown, shown.stage("outer"):
        with Progress.of(shown) as same:
            assert same is shown
        assert shown._ticker is not None, "still running for the outer part"
    assert shown._ticker is None


@pytest.mark.parametrize("columns", [40, 80])
def test_a_terminal_shows_figures_whole_and_breaks_no_word(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    with Progress() as shown:
        shown.say(SENTENCE)
        with shown.stage("scoring 8824 tokens with the float model") as stage:
            stage.at(0.86, "model.layers.27")
            shown.tick()
            shown._bar.refresh()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    assert all(len(line) <= columns for line in lines), lines
    said = [line for line in lines if "scoring" not in line]
    assert " ".join(said) == SENTENCE and len(said) == -(-len(SENTENCE) // columns), said
    assert any("86 %, 0 s" in line for line in lines)


SENTENCE = "a sentence of so many words that neither of the two widths tried here can hold it in a single line"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_durations() -> None:
    assert [duration(seconds) for seconds in (89, 91, 5399, 5401)] == ["89 s", "2 min", "90 min", "1.5 h"]


def test_time_that_has_passed_moves_from_line_to_line() -> None:
    assert [passed(seconds) for seconds in (89.4, 120, 127.9, 5401)] == ["89 s", "2 min 0 s", "2 min 7 s", "1.5 h"]
