"""The command line as a user meets it: what it prints, its exit codes, and what bad input leaves behind (nothing)."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from conftest import ROOT
from roundexport.cli.app import main
from roundexport.storage import atomic

SMALL_TUNE = ("--bits", "4", "--group-size", "32", "--num-samples", "4", "--sample-len", "32", "--steps", "2")

SCRIPT = Path(sys.executable).with_name("roundexport")

Run = Callable[..., tuple[int, str, str]]


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
    """Held-out text of a few windows; 32 are drawn from the model where there is no text, as `verify` does above."""
    path = tmp_path_factory.mktemp("text") / "little.txt"
    path.write_text(heldout_text.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def artifact(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tuned artifact of the tiny Llama."""
    from conftest import tuned

    out = tmp_path_factory.mktemp("cli") / "artifact"
    tuned(models("llama"), out, group_size=32, num_samples=4, sample_len=32, steps=2, progress=False)
    return out


@pytest.fixture(scope="module")
def packages(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``packages("onnx")`` is the artifact's package, made once, by a process of its own; not to be changed."""
    root = tmp_path_factory.mktemp("packages")

    def get(target: str) -> Path:
        if not (root / target).exists():
            subprocess.run([SCRIPT, "export", artifact, root / target, "--to", target], check=True, capture_output=True)
        return root / target

    return get


def left_behind(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_tune_export_verify_generate_in_a_row(run: Run, models: Callable[[str], Path], tmp_path: Path) -> None:
    model = models("llama")
    code, out, err = run("tune", model, tmp_path / "artifact", *SMALL_TUNE)
    assert code == 0, err
    assert "bits per weight" in out
    code, out, err = run("export", tmp_path / "artifact", tmp_path / "onnx", "--to", "onnx")
    assert code == 0, err
    assert "equal to the artifact" in out
    verify = ("verify", tmp_path / "onnx", "--against", model, "--artifact", tmp_path / "artifact")
    code, out, err = run(*verify, "--num-samples", "2", "--sample-len", "32", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["integers_checked"] == 16 and report["quality"]["kl"]["mean"] > 0
    code, out, err = run("generate", tmp_path / "onnx", "--prompt", "The man", "--max-new-tokens", "8")
    assert code == 0, err
    assert out.strip()


def test_a_failed_gate_exits_3_after_printing_the_figures(
    run: Run, packages: Callable[[str], Path], models: Callable[[str], Path]
) -> None:
    verify = ("verify", packages("onnx"), "--against", models("llama"), "--num-samples", "2", "--sample-len", "32")
    code, out, err = run(*verify, "--max-kl", "1e-9")
    assert code == 3 and "KL" in out and "above --max-kl" in err
    assert run(*verify, "--max-kl", "100", "--min-top1", "0")[0] == 0
    code, _, err = run(*verify, "--min-cosine", "0.9")
    assert code == 2 and "encoder" in err


def _no_model(tmp: Path, model: Path) -> Path:
    (tmp / "empty").mkdir()
    return tmp / "empty"


def _missing_shard(tmp: Path, model: Path) -> Path:
    shutil.copytree(model, tmp / "m")
    (tmp / "m" / "model.safetensors").rename(tmp / "m" / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors",
             "lm_head.weight": "model-00001-of-00002.safetensors"}}  # fmt: skip
    (tmp / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp / "m"


def _pickle(tmp: Path, model: Path) -> Path:
    shutil.copytree(model, tmp / "m")
    (tmp / "m" / "model.safetensors").unlink()
    (tmp / "m" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    return tmp / "m"


def _truncated(tmp: Path, model: Path) -> Path:
    shutil.copytree(model, tmp / "m")
    data = (tmp / "m" / "model.safetensors").read_bytes()
    (tmp / "m" / "model.safetensors").write_bytes(data[:-100])
    return tmp / "m"


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (_no_model, (), "empty"),
        (_missing_shard, (), "model-00002-of-00002.safetensors"),
        (_pickle, (), "pytorch_model.bin"),
        (_truncated, (), "model.safetensors"),
        (lambda tmp, model: model, ("--target-bits", "2"), "2.000 bits per weight cannot be met"),
        (lambda tmp, model: model, ("--bits", "5"), "bits 5 is not supported"),
        (lambda tmp, model: model, ("--group-size", "33"), "group_size 33 is not supported"),
        (lambda tmp, model: model, ("--group-size", "few"), "--group-size"),
        (lambda tmp, model: model, ("--algorithm", "magic"), "signround"),
        (lambda tmp, model: tmp / "nowhere", (), "nowhere"),
    ],
    ids=[
        "no model",
        "missing shard",
        "pickle",
        "truncated",
        "group",
        "bits 5",
        "group 33",
        "group word",
        "algorithm",
        "path",
    ],
)
def test_bad_input_to_tune_is_named_and_leaves_nothing(
    prepare: Callable[[Path, Path], Path], options: Sequence[str], message: str, run: Run,
    models: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    model = prepare(tmp_path, models("llama"))
    before = left_behind(tmp_path)
    code, out, err = run("tune", model, tmp_path / "out", *(SMALL_TUNE if not options else (*SMALL_TUNE, *options)))
    assert code in (1, 2), err
    assert message in err
    assert "Traceback" not in err and out == ""
    assert left_behind(tmp_path) == before


def test_calibration_shorter_than_a_sample_says_how_long_it_is(run: Run, models: Callable[[str], Path],
                                                               tmp_path: Path) -> None:  # fmt: skip
    text = tmp_path / "short.txt"
    text.write_text("Too short.")
    code, _, err = run("tune", models("llama"), tmp_path / "out", *SMALL_TUNE, "--calibration", text)
    assert code in (1, 2) and "short.txt" in err and "32" in err
    assert left_behind(tmp_path) == ["short.txt"]


@pytest.mark.parametrize("verb", ["tune", "export"])
def test_an_output_that_exists_is_left_alone(verb: str, run: Run, artifact: Path, models: Callable[[str], Path],
                                             tmp_path: Path) -> None:  # fmt: skip
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    code, _, err = run(verb, models("llama") if verb == "tune" else artifact, out)
    assert code == 2 and "out" in err and "exist" in err
    assert (out / "precious").read_text() == "kept" and left_behind(tmp_path) == ["out"]


def test_a_full_disk_exits_4_and_leaves_nothing(run: Run, artifact: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(atomic.os, "fsync", full)
    code, _, err = run("export", artifact, tmp_path / "out", "--to", "onnx")
    assert code == 4 and "out" in err
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_one_flipped_byte_in_the_largest_file_is_refused(
    target: str, run: Run, packages: Callable[[str], Path], tmp_path: Path
) -> None:
    package = shutil.copytree(packages(target), tmp_path / "package")
    largest = max((p for p in package.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    for command in (("verify", package, "--against", "unused", "--files"), ("generate", package, "--prompt", "A")):
        code, _, err = run(*command)
        assert code == 1 and largest.name in err, command


def test_export_of_another_models_artifact_is_refused(run: Run, artifact: Path, models: Callable[[str], Path],
                                                      tmp_path: Path) -> None:  # fmt: skip
    code, _, err = run("export", artifact, tmp_path / "out", "--model", models("qwen3"))
    assert code == 1 and "not the model this artifact was tuned from" in err


def test_inspect_tells_the_three_kinds_apart(
    run: Run, artifact: Path, packages: Callable[[str], Path], models: Callable[[str], Path], tmp_path: Path
) -> None:
    assert json.loads(run("inspect", models("llama"), "--json")[1])["kind"] == "model"
    assert json.loads(run("inspect", artifact, "--json")[1])["kind"] == "artifact"
    found = json.loads(run("inspect", packages("openvino"), "--json")[1])
    assert found["kind"] == "package" and len(found["rows"]) == 16
    assert run("inspect", tmp_path)[0] == 2


@pytest.mark.parametrize("kind", ["algorithms", "targets", "devices", "kernels", "engines"])
def test_list_prints_names(kind: str, run: Run) -> None:
    code, out, _ = run("list", kind, "--json")
    assert code == 0 and isinstance(json.loads(out), dict)


def test_a_float_model_can_be_exported_as_it_is(run: Run, models: Callable[[str], Path], tmp_path: Path) -> None:
    code, out, err = run("export", models("llama"), tmp_path / "float", "--to", "openvino", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["exported"] == [] and len(report["kept_float"]) == 16


def test_convert_makes_everything_and_refuses_to_do_it_twice(
    run: Run, models: Callable[[str], Path], little_text: Path, tmp_path: Path
) -> None:
    arguments = ("convert", models("llama"), tmp_path / "out", *SMALL_TUNE, "--text", little_text, "--to", "onnx")
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "all equal" in out
    assert left_behind(tmp_path / "out") == ["artifact", "onnx", "quality.json", "request.json"]
    code, _, err = run(*arguments)
    assert code == 2 and "finished conversion" in err
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
    ],
    ids=["bits", "budget", "text", "target"],
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
    code, _, err = run("convert", models("llama"), tmp_path / "out", *SMALL_TUNE, "--text", little_text)
    assert code == 1 and "not today" in err and "kept in" in err
    assert left_behind(tmp_path / "out") == ["artifact", "openvino", "request.json"]
    monkeypatch.undo()


def test_verify_against_another_model_is_refused(
    run: Run, packages: Callable[[str], Path], models: Callable[[str], Path]
) -> None:
    code, _, err = run("verify", packages("onnx"), "--against", models("qwen3"))
    assert code == 1 and "is not the model" in err
    code, _, err = run("verify", packages("onnx"), "--against", models("llama"), "--num-samples", "1")
    assert code == 2 and "at least 2" in err


def test_the_console_script_is_installed() -> None:
    out = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True)
    for verb in ("inspect", "tune", "export", "verify", "convert", "generate", "bench", "list"):
        assert verb in out.stdout


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_an_export_that_was_killed_starts_clean_and_gives_the_same_bytes(
    target: str, run: Run, artifact: Path, packages: Callable[[str], Path], tmp_path: Path
) -> None:
    whole, again = packages(target), tmp_path / "again"
    killed = subprocess.Popen(
        [SCRIPT, "export", artifact, again, "--to", target],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while not any(p.name.startswith(".again") and p.is_dir() and any(p.iterdir()) for p in tmp_path.iterdir()):
        assert killed.poll() is None, "it finished before anything was seen"
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)  # OpenVINO's telemetry is a fork that holds the lock for some seconds more
    killed.wait()
    assert not again.exists()
    code, _, err = run("export", artifact, again, "--to", target)
    assert code == 0, err
    assert left_behind(tmp_path) == ["again"]
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    for name in files:
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_gate_that_does_not_fit_the_model_is_refused_before_tuning(
    run: Run, models: Callable[[str], Path], tmp_path: Path
) -> None:
    code, _, err = run("convert", models("bert"), tmp_path / "out", *SMALL_TUNE, "--max-kl", "0.1")
    assert code == 2 and "gates for decoders" in err and left_behind(tmp_path) == []


def test_an_artifact_whose_model_moved_says_to_pass_it(run: Run, artifact: Path, tmp_path: Path) -> None:
    moved = tmp_path / "artifact"
    shutil.copytree(artifact, moved)
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["source"]["location"] = "gone/away/model"
    (moved / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = run("export", moved, tmp_path / "out")
    assert code == 1 and "gone/away/model" in err and "--model" in err


def test_any_other_exception_is_one_line_and_its_trace_comes_on_request(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(path: str) -> None:
        raise ValueError("two\nlines \x1b[31m")

    monkeypatch.setattr("roundexport.inspection.inspect", broken)
    code, out, err = run("inspect", tmp_path)
    assert (code, out) == (1, "") and err.count("\n") == 1 and "\x1b" not in err
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
    def broken(path: str) -> None:
        raise error

    monkeypatch.setattr("roundexport.inspection.inspect", broken)
    assert run("inspect", tmp_path)[0] == code and text in run("inspect", tmp_path)[2]


def test_ctrl_c_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("roundexport.conversion.convert", interrupted)
    code, _, err = run("convert", tmp_path, tmp_path / "out")
    assert code == 130 and "interrupted; finished parts are kept" in err and "same command again" in err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("tune", "m", "o", "--seed", "99999999999999999999999"), "seed must be from 0"),
        (("tune", "m", "o", "--max-ram", "inf"), "max_ram must be a finite number"),
        (("tune", "m", "o", "--target-bits", "nan"), "target_bits must be"),
        (("tune", "m", "o", "--num-samples", "1000000000000"), "1,000,000,000 tokens"),
        (("tune", "{model}", "o", "--device", "meta"), "device 'meta' cannot be used"),
        (("tune", "{model}", "o", "--algorithm", "teq"), "'teq' is a transform"),
        (("tune", "{model}", "o", "--algorithm", "end_to_end"), "'end_to_end' is a finisher"),
        (("tune", "{model}", "o", "--threads", "99999"), "threads must be from 1"),
        (("verify", "p", "--against", "m", "--threads", "0"), "threads must be from 1"),
        (("bench", "p", "-t", "-1"), "threads must be from 1"),
        (("bench", "p", "--seed", "-1"), "seed must be from 0"),
        (("generate", "{package}", "--prompt", "x", "-t", "99999"), "threads must be from 1"),
        (("generate", "{package}", "--prompt", "x", "--temperature", "inf"), "temperature must be finite"),
        (("verify", "{package}"), "give --against MODEL, or --files"),
        (("verify", "{package}", "--against", "m", "--max-kl", "nan"), "--max-kl must be 0 or more, not nan"),
        (("verify", "{package}", "--against", "m", "--min-top1", "2"), "--min-top1 must be from 0 to 1, not 2.0"),
        (("convert", "{model}", "o", "--max-kl", "-1"), "--max-kl must be 0 or more"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, tuple) else "",
)
def test_senseless_options_are_refused_before_any_work(
    run: Run, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    places = {"{model}": models("llama"), "{package}": ROOT / "tests/golden/onnx"}
    code, _, err = run(*(places.get(word, word) for word in command))
    assert code == 2 and message in err, err
    assert not left_behind(tmp_path)


def test_a_damaged_request_is_told(run: Run, models: Callable[[str], Path], tmp_path: Path) -> None:
    for text in ("{", "[1]", "[" * 100_000):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/request.json").write_text(text)
        code, _, err = run("convert", models("llama"), tmp_path / "out")
        assert code == 2 and "request.json is damaged" in err
