"""Exported OpenVINO folders: integers proven equal, manifest and report, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset15 as ops
from openvino_tools import (
    INT8_ROW,
    Package,
    make_artifact,
)

from conftest import FAMILIES
from roundexport.errors import ArtifactError, RoundexportError, UsageError
from roundexport.formats.package import read_package
from roundexport.model.checkpoint import Checkpoint
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import LinearInfo, QuantSpec
from roundexport.targets import openvino as target
from roundexport.targets.openvino.readback import found_layers
from roundexport.targets.openvino.saving import save
from roundexport.targets.openvino.stable_names import first_of_merged


@pytest.mark.parametrize("family", FAMILIES)
def test_package_holds_the_artifacts_integers(openvino_packages, family: str) -> None:
    package = openvino_packages(family)
    found = target.read_back(package.folder)
    assert set(found) == set(package.artifact.names()) == set(package.report.exported)
    assert all(found[name].equals(package.artifact.linear(name)) for name in found)


def test_manifest_and_report_say_what_was_made(openvino_packages) -> None:
    package = openvino_packages("qwen3")
    manifest = read_package(package.folder)
    assert manifest.target == "openvino" and manifest.task == "generate" and manifest.model_type == "qwen3"
    assert [(layer["num_kv_heads"], layer["head_dim"]) for layer in manifest.kv] == [(2, 32), (2, 32)]
    assert manifest.tokens == {"bos": 0, "eos": (0,), "pad": 1}
    assert manifest.layers["model.embed_tokens"]["stored"] == "i8"
    assert manifest.layers["model.layers.0.mlp.up_proj"] == {
        "bits": 4, "group_size": 32, "symmetric": True, "stored": "i4",
    }  # fmt: skip
    assert package.report.files.keys() == manifest.files.keys()
    assert {
        "openvino_tokenizer.xml",
        "openvino_detokenizer.bin",
        "tokenizer.json",
        "config.json",
    } < manifest.files.keys()
    assert json.loads((package.folder / "generation_config.json").read_text())["eos_token_id"] == 0


def test_float_layers_have_their_reason_and_none_is_lost(openvino_packages) -> None:
    gpt2 = openvino_packages("gpt2").report.kept_float
    assert gpt2 == (("transformer.wpe", "not in the artifact"),)
    bert = dict(openvino_packages("bert").report.kept_float)
    assert bert["embeddings.position_embeddings"] == "not in the artifact"
    assert bert["pooler.dense"] == "last_hidden_state does not depend on it"


def test_equal_exports_give_equal_bytes(openvino_packages, tmp_path: Path) -> None:
    package = openvino_packages("gemma3")
    target.export(package.artifact, package.checkpoint, tmp_path, target.OpenVinoSettings())
    for path in sorted(package.folder.iterdir()):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("name", "tensors", "wanted"),
    [
        ("cat_1/aten.cat/Concat", ["57", "cat:0", "cat_1:0"], "cat/aten.cat/Concat"),
        ("cat/aten.cat/Concat", ["45", "cat:0", "cat_1:0"], "cat/aten.cat/Concat"),
        ("cat_1/aten.cat/Concat", ["57", "cat_1:0"], "cat_1/aten.cat/Concat"),
        ("model.layers.0.weight/scale", ["w:0"], "model.layers.0.weight/scale"),
        ("logits", ["logits", "linear:0"], "logits"),
    ],
)
def test_merged_nodes_have_one_name(name: str, tensors: list[str], wanted: str) -> None:
    assert first_of_merged(name, tensors) == wanted


def test_a_changed_integer_is_found(openvino_packages, tmp_path: Path) -> None:
    package = openvino_packages("llama")
    shutil.copytree(package.folder, tmp_path / "p")
    codes = package.artifact.linear("model.layers.0.mlp.up_proj").codes.tobytes()
    data = bytearray((tmp_path / "p" / "openvino_model.bin").read_bytes())
    place = bytes(data).find(bytes(byte ^ 0x88 for byte in codes))
    assert place >= 0
    data[place] ^= 1
    (tmp_path / "p" / "openvino_model.bin").write_bytes(bytes(data))
    found = target.read_back(tmp_path / "p")
    differing = [name for name in found if not found[name].equals(package.artifact.linear(name))]
    assert differing == ["model.layers.0.mlp.up_proj"]
    with pytest.raises(ArtifactError, match=r"openvino_model\.bin"):
        read_package(tmp_path / "p")


def test_rows_of_merged_layers_that_are_cut_elsewhere_are_found(openvino_packages, tmp_path: Path) -> None:
    package = openvino_packages("llama")
    name = "model.layers.0.self_attn.k_proj"
    model = ov.Core().read_model(package.folder / "openvino_model.xml")
    names = "+".join(f"model.layers.0.self_attn.{letter}_proj" for letter in "qkv")
    split = next(node for node in model.get_ops() if node.get_friendly_name() == f"{names}/parts")
    lengths = np.array(split.input_value(2).get_node().data)
    layers = {name: read_package(package.folder, check_hashes=False).layers[name]}

    def read(moved: list[int], axis: int = -1) -> QuantizedLinear:
        split.input(1).replace_source_output(ops.constant(np.array(axis, np.int64)).output(0))
        split.input(2).replace_source_output(ops.constant(lengths + moved).output(0))
        ov.save_model(model, tmp_path / "moved.xml", compress_to_fp16=False)
        return next(found.linear for _, found in found_layers(tmp_path / "moved.xml", layers))

    assert read([0, 0, 0]).equals(package.artifact.linear(name))
    assert not read([1, -1, 0]).equals(package.artifact.linear(name))
    with pytest.raises(ArtifactError, match=r"rows of 3 layers, cut into .* along axis \[1\]"):
        read([0, 0, 0], axis=1)


def test_a_truncated_graph_is_no_package(openvino_packages, tmp_path: Path) -> None:
    package = openvino_packages("llama")
    shutil.copytree(package.folder, tmp_path / "p")
    path = tmp_path / "p" / "openvino_model.bin"
    path.write_bytes(path.read_bytes()[:-1000])
    manifest = read_package(package.folder)
    with pytest.raises(ArtifactError, match="OpenVINO cannot read it"):
        list(found_layers(tmp_path / "p" / manifest.model_file, manifest.layers))


def test_a_full_disk_is_told_as_one(tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(ov, "save_model", fail)
    model = ov.Model([], [], "empty")
    with pytest.raises(RoundexportError, match="could not write it: basic_ios"):
        save(model, tmp_path / "m.xml")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OSError, match="No space left on device"):
        save(model, tmp_path / "m.xml")


def test_a_tuned_layer_that_the_output_does_not_need_is_an_error(models, tmp_path: Path) -> None:
    def everything(info: LinearInfo) -> QuantSpec:
        return INT8_ROW

    checkpoint = Checkpoint.open(models("bert"))
    artifact = make_artifact(checkpoint, tmp_path / "a", everything, poolers=True)
    (tmp_path / "p").mkdir()
    with pytest.raises(ArtifactError, match=r"pooler\.dense.*does not depend on it"):
        target.export(artifact, checkpoint, tmp_path / "p", target.OpenVinoSettings())


def test_a_context_beyond_the_models_is_refused(openvino_packages, tmp_path: Path) -> None:
    package = openvino_packages("llama")
    with pytest.raises(UsageError, match="max_context 513 is beyond the 512 positions"):
        target.export(package.artifact, package.checkpoint, tmp_path, target.OpenVinoSettings(max_context=513))


def test_without_tokenizer_the_package_stands_and_says_so(models, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models("llama, one block"), folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    package = Package(folder, tmp_path)
    assert package.report.refused == (("openvino_tokenizer", "the model folder has no tokenizer"),)
    assert "openvino_model.xml" in package.report.files
