"""`convert --recipe bct`: the artifact of an integer encoder, packages of its integers, verified, lean, and opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import roundexport
from roundexport import TuneSettings
from roundexport.conversion import encoder_recipes
from roundexport.conversion.convert import Conversion
from roundexport.errors import WrongOutputsError
from roundexport.formats.artifact import Artifact
from roundexport.formats.package import MANIFEST, read_package
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.integer_inputs import recorded
from roundexport.reports.components import components
from roundexport.targets.output_check import check_outputs


@pytest.fixture(scope="module")
def settings(calibration_text: Path) -> TuneSettings:
    return TuneSettings(recipe="bct", calibration=str(calibration_text), num_samples=4, sample_len=16)


@pytest.fixture(scope="module")
def converted(
    models: Callable[[str], Path], settings: TuneSettings, tmp_path_factory: pytest.TempPathFactory
) -> Conversion:
    out = tmp_path_factory.mktemp("bct") / "out"
    return roundexport.convert(models("bert"), out, settings, min_cosine=0.9, progress=False)


def test_the_artifact_is_what_was_planned(
    converted: Conversion, models: Callable[[str], Path], settings: TuneSettings
) -> None:
    artifact, checkpoint = Artifact.open(converted.artifact), Checkpoint.open(str(models("bert")))
    assert artifact.manifest.algorithm["name"] == "bct_encoder"
    assert artifact.manifest.calibration["num_samples"] == 4
    assert len(recorded(artifact)) == 12 and len(artifact.names()) == 15
    planned = encoder_recipes.planned_layers(checkpoint, settings)
    assert {info.name: spec for info, spec in planned if "pooler" not in info.name} == {
        name: artifact.entry(name).spec for name in artifact.names()
    }
    assert encoder_recipes.planned_layers(checkpoint, TuneSettings(recipe="w8a8")) == ()


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_the_package_is_whole_and_near_the_float_model(converted: Conversion, target: str) -> None:
    said = dict(components(read_package(converted.packages[target])))
    assert said["products"] == "12, 4-bit weights × 8-bit inputs, int32 sums"
    assert said["attention, activations, norms, sums"] == "floats"
    quality: Any = converted.quality[target].quality
    assert 0.9 < quality.cosine.mean < 1
    vectors = roundexport.load(converted.packages[target]).embed(["a text", "another, longer text"])
    assert vectors.shape == (2, 64) and np.isfinite(vectors).all()


def test_the_graph_keeps_names_that_say_something(converted: Conversion) -> None:
    graph = onnx.load(converted.packages["onnx"] / "model.onnx", load_external_data=False).graph
    outputs = {output.name for output in graph.output}
    assert all(name.isdigit() or name in outputs for node in graph.node for name in node.output if name)
    assert not graph.value_info and not any(node.name.startswith("node_") for node in graph.node)
    assert sum(node.name.endswith("/MatMulIntegerToFloat") for node in graph.node) == 8


def test_a_graph_beside_right_integers_that_is_wrong_is_refused(
    converted: Conversion, models: Callable[[str], Path], tmp_path: Path
) -> None:
    """Codes flip, so more is allowed here than of floats; a graph without its mask is still beyond it."""
    folder = tmp_path / "package"
    shutil.copytree(converted.packages["onnx"], folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == "attention_mask":
                node.input[place] = "input_ids"  # never 0: nothing is hidden
    onnx.save(model, folder / "model.onnx")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["model.onnx"]["size"] = (folder / "model.onnx").stat().st_size
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(WrongOutputsError, match="padded"):
        check_outputs(folder, Artifact.open(converted.artifact), Checkpoint.open(str(models("bert"))))
