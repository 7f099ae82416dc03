"""`--recipe w8a8`: the float package proven, then in eight bits by the target's own tool, and opened as any package."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
import pytest

import roundexport
from roundexport import TuneSettings
from roundexport.conversion.convert import Conversion
from roundexport.formats.package import read_package

SETTINGS = {"recipe": "w8a8", "num_samples": 4, "sample_len": 16}


@pytest.fixture(scope="module")
def converted(
    models: Callable[[str], Path], calibration_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Conversion:
    pytest.importorskip("nncf")
    out = tmp_path_factory.mktemp("w8a8") / "out"
    settings = TuneSettings(calibration=str(calibration_text), **SETTINGS)  # type: ignore[arg-type]
    return roundexport.convert(models("bert"), out, settings, min_cosine=0.985, progress=False)


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_the_package_is_whole_and_near_the_float_model(converted: Conversion, target: str) -> None:
    manifest = read_package(converted.packages[target])
    said = manifest.settings["w8a8"]
    assert said["layers"] == 15 and said["samples"] == 3  # the fourth is for the figure
    assert said["reverted"] == [] and said["cosine_wanted"] == 0.985 < said["cosine"] < 1
    reasons = Counter(reason for _, reason in manifest.kept_float if reason.startswith("in 8 bits, not by"))
    assert sum(reasons.values()) == 15
    quality: Any = converted.quality[target].quality
    assert 0.99 < quality.cosine.mean < 1
    assert any("in 8 bits" in note for note in converted.exports[target].notes)
    vectors = roundexport.load(converted.packages[target]).embed(["a text", "another, longer text"])
    assert vectors.shape == (2, 64) and np.isfinite(vectors).all()
    assert len({path.stat().st_mode for path in converted.packages[target].iterdir() if path.is_file()}) == 1


def test_onnx_holds_int8_weights_and_uint8_tables(converted: Conversion) -> None:
    graph = onnx.load(converted.packages["onnx"] / "model.onnx", load_external_data=False).graph
    kinds = Counter(tensor.data_type for tensor in graph.initializer if len(tensor.dims) > 1)
    assert (kinds[onnx.TensorProto.INT8], kinds[onnx.TensorProto.UINT8]) == (12, 3)


def test_openvino_multiplies_in_int8(converted: Conversion) -> None:
    core = ov.Core()
    compiled = core.compile_model(core.read_model(converted.packages["openvino"] / "openvino_model.xml"), "CPU")
    kinds = {
        node.get_rt_info()["runtimePrecision"].astype(str)
        for node in compiled.get_runtime_model().get_ops()
        if node.get_rt_info()["layerType"].astype(str) == "FullyConnected"
    }
    assert kinds and kinds <= {"i8", "u8"}
