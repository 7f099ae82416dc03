"""The verbs as a user meets them: what each prints and writes when all goes well."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_tools import SCRIPT, SMALL_TUNE, Run


def test_tune_export_verify_generate_in_a_row(
    run: Run, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In folders with blanks and letters of three scripts, and without a network."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a name was looked up"))
    tmp_path = tmp_path / "модель 模型 é (1)"
    model = Path(shutil.copytree(models("llama"), tmp_path / "ein Modell"))
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


def test_inspect_tells_the_three_kinds_apart(
    run: Run, artifact: Path, package: Callable[[str], Path], models: Callable[[str], Path], tmp_path: Path
) -> None:
    code, out, err = run("inspect", models("llama"), "--json")
    assert code == 0 and json.loads(out)["kind"] == "model" and err.startswith("inspecting ")
    assert json.loads(run("inspect", artifact, "--json")[1])["kind"] == "artifact"
    found = json.loads(run("inspect", package("openvino"), "--json")[1])
    assert found["kind"] == "package" and len(found["rows"]) == 16
    assert run("inspect", tmp_path)[0] == 2


@pytest.mark.parametrize("kind", ["algorithms", "targets", "devices", "kernels", "engines"])
def test_list_prints_names(kind: str, run: Run) -> None:
    code, out, _ = run("list", kind, "--json")
    assert code == 0 and isinstance(json.loads(out), dict)


def test_a_float_model_can_be_exported_as_it_is(run: Run, models: Callable[[str], Path], tmp_path: Path) -> None:
    code, out, err = run("export", models("llama, one block"), tmp_path / "float", "--to", "openvino", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["exported"] == [] and len(report["kept_float"]) == 9


def test_the_console_script_is_installed() -> None:
    out = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True)
    for verb in (
        "inspect",
        "tune",
        "export",
        "verify",
        "convert",
        "generate",
        "classify",
        "chat",
        "serve",
        "bench",
        "list",
    ):
        assert verb in out.stdout
