"""Activations that stay in float32 where 8 bits cost most: which products, what is written, what is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx_support import record_losses, write_artifact, write_package

from roundexport.errors import ArtifactError, UsageError
from roundexport.formats.artifact import Artifact
from roundexport.formats.package import read_package
from roundexport.quant.spec import LinearInfo, QuantSpec
from roundexport.reports import story
from roundexport.schemes.activation_loss import ActivationLosses
from roundexport.targets.onnx import OnnxSettings
from roundexport.targets.onnx.float_products import SLOWDOWN, slowdown
from roundexport.targets.openvino import OpenVinoSettings
from roundexport.targets.spared import Spared, spared, spared_by

FOUR, EIGHT = QuantSpec(4, 32), QuantSpec(8, 32)
LAYERS = {
    "q": (LinearInfo("q", 64, 64), FOUR),
    "k": (LinearInfo("k", 64, 32), FOUR),
    "o": (LinearInfo("o", 64, 64), FOUR),
    "down": (LinearInfo("down", 128, 64), FOUR),
    "head": (LinearInfo("head", 64, 1024), EIGHT),
}
FOUND = ActivationLosses({"q": 0.2, "k": 0.5, "o": 0.4, "down": 0.9, "head": 3.0}, (("q", "k"),))


def test_the_largest_loss_that_the_time_allows_is_spared() -> None:
    total = sum(spec.storage_bits(info.out_features, info.in_features) for info, spec in LAYERS.values())
    price = {name: (SLOWDOWN - 1) * 4.5 * info.in_features * info.out_features for name, (info, _) in LAYERS.items()}
    share = (price["down"] + price["q"] + price["k"]) / total + 1e-6
    found = spared(FOUND, LAYERS, share, slowdown)
    assert set(found.layers) == {"q", "k", "down"}  # of one input: together or not at all
    assert found.left == pytest.approx(0.4 + 3.0) and found.loss == pytest.approx(5.0)
    assert found.time == pytest.approx(share, abs=1e-5)
    assert set(spared(FOUND, LAYERS, 1.0, slowdown).layers) == {
        "q",
        "k",
        "o",
        "down",
    }  # 8 bits have no fast float32 product
    assert spared(FOUND, LAYERS, price["k"] / total, slowdown).layers == ()


def test_losses_that_do_not_show_are_not_spared() -> None:
    losses = {**FOUND.losses, "o": 1e-4}
    assert "o" not in spared(ActivationLosses(losses, FOUND.sharing), LAYERS, 1.0, slowdown).layers


def test_an_export_spares_what_the_artifact_records(models: Callable[[str], Path], tmp_path: Path) -> None:
    artifact = write_artifact(models("llama, one block"), tmp_path / "artifact", FOUR, QuantSpec(8, None))
    names = [name for name in artifact.names() if artifact.entry(name).info.kind == "linear"]
    record_losses(artifact.path, {name: 0.5 if name.endswith("o_proj") else 1e-5 for name in names})
    report = write_package(Artifact.open(artifact.path), tmp_path / "package", activation_time=0.5)
    levels = {
        node.name: attribute.i
        for node in onnx.load(tmp_path / "package" / "model.onnx", load_external_data=False).graph.node
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    }
    assert [name for name, level in levels.items() if level == 0] == ["model.layers.0.self_attn.o_proj/MatMulNBits"]
    assert any("activations of 1 layers stay floats" in note and "self_attn.o_proj" in note for note in report.notes)
    settings = json.loads((tmp_path / "package" / "roundexport.json").read_text())["settings"]
    assert settings["float32_activations"] == ["model.layers.0.self_attn.o_proj"] and settings["accuracy_level"] == 4
    manifest = read_package(tmp_path / "package")
    told = dict(story.exported(SimpleNamespace(manifest=manifest)))  # type: ignore[arg-type]
    assert told["activations in float32"] == "model.layers.0.self_attn.o_proj"
    standard = write_package(Artifact.open(artifact.path), tmp_path / "standard", dialect="standard")
    assert not any("stay floats" in note for note in standard.notes)  # it has no product of another precision
    record_losses(artifact.path, {"o": "much"})
    with pytest.raises(ArtifactError, match="record of activations is damaged"):
        write_package(Artifact.open(artifact.path), tmp_path / "again")


@pytest.mark.parametrize("given", [{"accuracy_level": 0}, {"dialect": "standard"}, {"device": "gpu"}])
def test_a_time_that_would_buy_nothing_is_refused(given: dict[str, Any]) -> None:
    kind = OpenVinoSettings if "device" in given else OnnxSettings
    (said,) = (f"{name} {value}" for name, value in given.items())
    with pytest.raises(UsageError, match=f"activation_time 0.1 does nothing with {said}: leave one of them out"):
        kind(activation_time=0.1, **given)
    kind(activation_time=0.0, **given)
    kind(**given)


def test_a_time_is_refused_where_nothing_was_measured_or_nothing_can_be_spared() -> None:
    def artifact(settings: dict[str, Any]) -> Any:
        return SimpleNamespace(path="A", manifest=SimpleNamespace(algorithm={"settings": settings}))

    with pytest.raises(UsageError, match=r"0\.1 does nothing for A: what 8-bit .* was not measured, which tune --act"):
        spared_by(artifact({}), 0.1, slowdown)
    with pytest.raises(UsageError, match=r"0\.1 does nothing for A: all are floats; leave it out"):
        spared_by(artifact({"activations": FOUND}), 0.1, slowdown, "all are floats")
    for time in (None, 0.0):
        assert spared_by(artifact({}), time, slowdown) == Spared()
        assert spared_by(artifact({"activations": FOUND}), time, slowdown, "all are floats") == Spared()
