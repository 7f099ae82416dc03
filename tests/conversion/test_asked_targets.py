"""A target that cannot take a model: left out aloud where nobody named it, refused before tuning where somebody did."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from roundexport import TuneSettings
from roundexport.cli.app import main
from roundexport.conversion import asked_targets, convert
from roundexport.conversion.asked_targets import Asked, graph_settings, refusals, settle
from roundexport.errors import UnsupportedError, UsageError
from roundexport.model.checkpoint import Checkpoint
from roundexport.quant.spec import LinearInfo, QuantSpec
from roundexport.targets.interface import load_target
from roundexport.tuning.job import Job
from roundexport.tuning.planned_run import PlannedRun

Models = Callable[[str], Path]
BOTH = ("onnx", "openvino")


def test_a_layer_that_a_target_cannot_hold_is_found(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [(LinearInfo("gate", 64, 1), QuantSpec(4, 32)), (LinearInfo("up", 64, 64), QuantSpec(4, 32))]
    monkeypatch.setattr(asked_targets, "PlannedRun", lambda *_: SimpleNamespace(plan=SimpleNamespace(layers=layers)))
    found = refusals(Checkpoint.open(models("llama")), TuneSettings(), BOTH)
    assert list(found) == ["openvino"] and "gate (int4 g32 sym): a weight with one row" in found["openvino"]


def test_the_layers_are_those_that_tuning_plans(models: Models) -> None:
    checkpoint, settings = Checkpoint.open(models("llama")), TuneSettings(algorithm="bct")
    assert PlannedRun(checkpoint, settings).plan.layers == Job.of(models("llama"), settings).plan.layers


def test_the_own_operator_is_settled_before_anything_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "library.so"
    monkeypatch.setenv("ROUNDEXPORT_KERNELS", str(library))
    plain, both = TuneSettings(), Asked.of(None)
    assert graph_settings(both, plain, inputs_embeds=True, kernels=False) == {"inputs_embeds": True}
    with pytest.raises(UnsupportedError, match=r"python -m roundexport\.kernels\.native\.build"):
        graph_settings(both, plain, inputs_embeds=False, kernels=True)
    library.touch()
    asked = graph_settings(both, plain, inputs_embeds=False, kernels=True)
    assert load_target("onnx").known(asked) == {"kernels": True} and load_target("openvino").known(asked) == {}
    with pytest.raises(UsageError, match="openvino does not know"):
        graph_settings(Asked.of("openvino"), plain, inputs_embeds=False, kernels=True)
    with pytest.raises(UsageError, match="recipe bct has products of its own"):
        graph_settings(both, TuneSettings(recipe="bct"), inputs_embeds=False, kernels=True)


def test_who_named_a_target_is_told_the_command_for_the_others() -> None:
    assert settle(Asked.of(None), {}, "m", "o") == []
    assert settle(Asked.of(None), {"onnx": "no"}, "m", "o") == ["LEFT OUT: onnx cannot take this model: no"]
    with pytest.raises(UnsupportedError, match=r"onnx: no; nothing .* roundexport convert 'my m' o --to openvino \("):
        settle(Asked.of("onnx, openvino"), {"onnx": "no"}, "my m", "o")
    with pytest.raises(UnsupportedError, match=r"m cannot be exported to onnx and openvino: no$"):
        settle(Asked.of(None), dict.fromkeys(BOTH, "no"), "m", "o")


def test_a_target_that_nobody_named_is_left_out_aloud(
    models: Models,
    heldout_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    openvino_refuses: str,
) -> None:
    model, out, text = models("llama, one block"), tmp_path / "out", tmp_path / "text.txt"
    text.write_text(heldout_text.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    arguments = [str(model), str(out), "--recipe", "rtn", "--group-size", "16", "--text", str(text)]
    monkeypatch.setattr(sys, "argv", ["roundexport", "convert", *arguments])
    with pytest.raises(SystemExit, match="0"):
        main()
    printed, said = capsys.readouterr()
    assert re.search(f"LEFT OUT: openvino cannot take this model: .*{openvino_refuses}", printed)
    assert 0 < said.index("LEFT OUT: openvino") < said.index("tuning ")
    assert sorted(path.name for path in out.iterdir()) == ["artifact", "onnx", "quality.json", "request.json"]
    settings = TuneSettings(recipe="rtn", group_size=16)
    with pytest.raises(UsageError, match="holds a finished conversion of this very request"):
        convert.convert(model, out, settings, text=text, progress=False)
    with pytest.raises(UnsupportedError, match="cannot be exported to openvino: "):
        convert.convert(model, out, settings, to="openvino", progress=False)
