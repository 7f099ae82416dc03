"""`convert`: everything in one folder, what is made again and what is refused, and what a failure leaves behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from cli_tools import SMALL_TUNE, Run, left_behind
from silent_work import notes_silent_work


def test_convert_makes_everything_and_refuses_to_do_it_twice(
    run: Run, models: Callable[[str], Path], little_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = notes_silent_work(monkeypatch)
    arguments = (
        "convert",
        models("llama, one block"),
        tmp_path / "out",
        *SMALL_TUNE,
        "--text",
        little_text,
        "--to",
        "onnx",
    )
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "all equal" in out and silent == []
    assert left_behind(tmp_path / "out") == ["artifact", "onnx", "quality.json", "request.json"]
    card = (tmp_path / "out" / "onnx" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "KL, mean" in card and "Not measured" not in card
    code, _, err = run(*arguments)
    assert code == 2 and "finished conversion" in err
    (tmp_path / "out" / "rounds").mkdir()  # as a search for a KL leaves it that is killed at its very end
    code, _, err = run(*arguments, "--max-kl", "1e-9")  # a gate that it was not asked to pass before
    assert code == 3 and "1e-09" in err and not (tmp_path / "out" / "rounds").exists()
    code, _, err = run(*arguments, "--bits", "8")
    assert code == 2 and "was begun with bits 4" in err
    code, out, err = run(*arguments[:-1], "onnx,openvino")
    assert code == 0 and (tmp_path / "out" / "openvino" / "roundexport.json").is_file(), err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", "5"), "bits 5"),
        (("--target-bits", "2"), "cannot be met"),
        (("--text", "nowhere.txt"), "held-out text"),
        (("--to", "onnx,gguf"), "gguf"),
        (("--part", "all", "--kernels"), "--kernels goes with one part of a model"),
        (("--part", "all", "--cluster", "local:2"), "--cluster goes with one part of a model"),
    ],
    ids=["bits", "budget", "text", "target", "own operator for all parts", "cluster for all parts"],
)
def test_bad_input_to_convert_leaves_no_folder(
    options: Sequence[str], message: str, run: Run, models: Callable[[str], Path], tmp_path: Path
) -> None:
    code, out, err = run("convert", models("llama"), tmp_path / "a" / "out", *SMALL_TUNE, *options)
    assert code == 2 and message in err and out == ""
    assert left_behind(tmp_path) == []


def test_convert_leaves_a_foreign_folder_alone(run: Run, models: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    code, _, err = run("convert", models("llama"), tmp_path / "out", *SMALL_TUNE)
    assert code == 2 and "exists already" in err and left_behind(tmp_path / "out") == ["precious"]


def test_convert_makes_the_other_targets_when_one_fails(
    run: Run, models: Callable[[str], Path], little_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from roundexport.errors import UnsupportedError
    from roundexport.targets import onnx

    def refuse(*_: object) -> None:
        raise UnsupportedError("not today")

    monkeypatch.setattr(onnx, "TARGET", dataclasses.replace(onnx.TARGET, export=refuse))
    code, _, err = run("convert", models("llama, one block"), tmp_path / "out", *SMALL_TUNE, "--text", little_text)
    assert code == 1 and "not today" in err and "kept in" in err
    assert left_behind(tmp_path / "out") == ["artifact", "openvino", "request.json"]
    monkeypatch.undo()


def test_a_gate_that_does_not_fit_the_model_is_refused_before_tuning(
    run: Run, models: Callable[[str], Path], tmp_path: Path
) -> None:
    code, _, err = run("convert", models("bert"), tmp_path / "out", *SMALL_TUNE, "--max-kl", "0.1")
    assert code == 2 and "gates for decoders" in err and left_behind(tmp_path) == []


def test_a_damaged_request_is_told(run: Run, models: Callable[[str], Path], tmp_path: Path) -> None:
    for text in ("{", "[1]", "[" * 100_000):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/request.json").write_text(text)
        code, _, err = run("convert", models("llama"), tmp_path / "out")
        assert code == 2 and "request.json is damaged" in err
