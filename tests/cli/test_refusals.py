"""Bad input to the verbs: the message names it, the exit code says whose fault it is, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from cli_tools import SMALL_TUNE, Run, left_behind

from conftest import ROOT


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


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_one_flipped_byte_in_the_largest_file_is_refused(
    target: str, run: Run, package: Callable[[str], Path], tmp_path: Path
) -> None:
    damaged = shutil.copytree(package(target), tmp_path / "package")
    largest = max((p for p in damaged.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    for command in (("verify", damaged, "--against", "unused", "--files"), ("generate", damaged, "--prompt", "A")):
        code, _, err = run(*command)
        assert code == 1 and largest.name in err, command


def test_export_of_another_models_artifact_is_refused(run: Run, artifact: Path, models: Callable[[str], Path],
                                                      tmp_path: Path) -> None:  # fmt: skip
    code, _, err = run("export", artifact, tmp_path / "out", "--model", models("qwen3"))
    assert code == 1 and "not the model this artifact was tuned from" in err


def test_verify_against_another_model_is_refused(
    run: Run, package: Callable[[str], Path], models: Callable[[str], Path]
) -> None:
    code, _, err = run("verify", package("onnx"), "--against", models("qwen3"))
    assert code == 1 and "is not the model" in err
    code, _, err = run("verify", package("onnx"), "--against", models("llama"), "--num-samples", "1")
    assert code == 2 and "at least 2" in err


def test_an_artifact_whose_model_moved_says_to_pass_it(run: Run, artifact: Path, tmp_path: Path) -> None:
    moved = tmp_path / "artifact"
    shutil.copytree(artifact, moved)
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["source"]["location"] = "gone/away/model"
    (moved / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = run("export", moved, tmp_path / "out")
    assert code == 1 and "gone/away/model" in err and "--model" in err


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
