"""What an export would refuse is found from the config alone, and before anything is tuned."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from roundexport import TuneSettings, inspect
from roundexport.conversion import convert
from roundexport.errors import CheckpointError, RoundexportError, UnsupportedError, UsageError
from roundexport.graph.capture import Capture
from roundexport.model.checkpoint import Checkpoint
from roundexport.targets.check import dry_run
from roundexport.targets.interface import load_target
from roundexport.tuning.run import tune

BOTH = ("onnx", "openvino")


def test_what_can_be_exported_passes(models: Callable[[str], Path]) -> None:
    found = dry_run(Checkpoint.open(models("bert")), BOTH)
    assert found.refused == {} and found.notes == ()


def test_one_target_refuses_and_the_other_does_not(models: Callable[[str], Path], openvino_refuses: str) -> None:
    found = dry_run(Checkpoint.open(models("llama, one block")), BOTH)
    assert list(found.refused) == ["openvino"] and openvino_refuses in found.refused["openvino"]


def test_inspect_says_who_takes_a_model_and_who_does_not(models: Callable[[str], Path], openvino_refuses: str) -> None:
    facts = inspect(models("llama, one block")).facts
    assert facts["exports to"] == "onnx" and openvino_refuses in facts["openvino refuses"]


def test_equal_blocks_are_lowered_once(models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def noting(captured: Capture) -> None:
        asked.append(len(captured.attentions))

    target = replace(load_target("onnx"), check=noting)
    monkeypatch.setattr("roundexport.targets.check.load_target", lambda _: target)
    dry_run(Checkpoint.open(models("llama")), ["onnx"])
    assert asked == [1]


SIDE_FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "tokenizer linked outside": (
        "tokenizer.json",
        lambda p: p.symlink_to("/etc/hostname"),
        "leaves the folder|outside",
    ),
    "no tokenizer": ("tokenizer.json", lambda p: p.write_text("{}"), "not a tokenizer"),
    "token of another kind": ("tokenizer_config.json", lambda p: p.write_text('{"bos_token": 3}'), "bos_token must be"),
    "template of bytes": ("chat_template.jinja", lambda p: p.write_bytes(b"\xff\xfe{"), "not UTF-8"),
    "licence linked outside": ("LICENSE", lambda p: p.symlink_to("/etc/hostname"), "leaves the folder|outside"),
    "generation config": ("generation_config.json", lambda p: p.write_text("[]"), "generation_config.json"),
}


@pytest.mark.parametrize("name", SIDE_FILES)
def test_a_side_file_that_cannot_travel_is_refused_before_tuning(
    name: str, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, spoil, why = SIDE_FILES[name]
    shutil.copytree(models("llama"), tmp_path / "m")
    (tmp_path / "m" / file).unlink(missing_ok=True)
    spoil(tmp_path / "m" / file)
    monkeypatch.setattr(convert, "tune", lambda *_, **__: pytest.fail("tuned before it was known to be in vain"))
    with pytest.raises(RoundexportError, match=why):
        convert.convert(tmp_path / "m", tmp_path / "out", TuneSettings(), progress=False)


def test_tune_alone_asks_whether_side_files_can_be_read(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models("llama"), tmp_path / "m")
    right = Path.open

    def refusing(self: Path, *args: Any, **given: Any) -> Any:
        if self.name == "NOTICE":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return right(self, *args, **given)

    (tmp_path / "m" / "NOTICE").write_text("mine")
    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(CheckpointError, match="NOTICE cannot be read: Permission denied"):
        tune(tmp_path / "m", tmp_path / "a", TuneSettings(recipe="rtn"), writer=None, progress=False)


def test_what_no_target_can_have_is_said_once(tmp_path: Path) -> None:
    from transformers import XLNetConfig, XLNetLMHeadModel

    XLNetLMHeadModel(XLNetConfig(vocab_size=384, d_model=64, n_layer=1, n_head=4, d_inner=128)).save_pretrained(
        tmp_path
    )
    with pytest.raises(UnsupportedError, match=r"cannot be exported to onnx and openvino: transformer\.mask_emb"):
        convert.convert(tmp_path, tmp_path / "out", progress=False)


def test_an_unknown_target_is_a_usage_error(models: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="unknown target"):
        dry_run(Checkpoint.open(models("llama")), ["tflite"])


def test_convert_asks_before_it_tunes(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, openvino_refuses: str
) -> None:
    monkeypatch.setattr(convert, "tune", lambda *_, **__: pytest.fail("tuned before it was known to be in vain"))
    with pytest.raises(UnsupportedError, match=f"openvino: {openvino_refuses}.* --to onnx "):
        convert.convert(
            models("llama, one block"), tmp_path / "out", TuneSettings(), to="onnx,openvino", progress=False
        )
    assert not (tmp_path / "out").exists()
