"""A model folder's Python never runs unasked, whatever a pipe answers to transformers' question."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from roundexport import export

ROOT = Path(__file__).resolve().parents[2]
LOADING = ROOT / "roundexport" / "model" / "transformers_loading.py"
TRIAL = ROOT / "roundexport" / "families" / "trial.py"  # reads the folder that it has just written itself
SOURCES = sorted(path for top in ("roundexport", "runtime", "kernels") for path in (ROOT / top).rglob("*.py"))


def _calls(path: Path) -> list[ast.Call]:
    found = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    names = ("from_pretrained", "from_config")
    return [call for call in found if isinstance(call.func, ast.Attribute) and call.func.attr in names]


def test_transformers_reads_folders_through_one_file_only() -> None:
    around = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in SOURCES
        if path not in (LOADING, TRIAL)
        for call in _calls(path)
    ]
    assert around == []


def test_every_call_there_says_whether_code_may_run() -> None:
    calls = _calls(LOADING) + _calls(TRIAL)
    assert len(calls) >= 5
    assert all("trust_remote_code" in {keyword.arg for keyword in call.keywords} for call in calls)


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_code_in_a_folder_does_not_run_when_a_pipe_says_yes(
    models: Callable[[str], Path], tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = Path(shutil.copytree(models("llama, one block"), tmp_path / "model"))
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass E: pass\n")
    settings = {"tokenizer_class": "E", "auto_map": {"AutoTokenizer": ["evil.E", "evil.E"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.E", "AutoModel": "evil.E", "AutoModelForCausalLM": "evil.E"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    answers = tmp_path / "answers"
    answers.write_text("y\n" * 50)
    monkeypatch.chdir(tmp_path)
    with answers.open() as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        export(folder, tmp_path / "out", to=target, progress=False)
        assert pipe.tell() == 0, "something was asked"
    assert not ran.exists()
    assert "trust_remote_code" not in capsys.readouterr().out
