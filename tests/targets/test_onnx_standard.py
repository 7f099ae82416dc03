"""The standard dialect: ONNX's own operators, the artifact's integers, the same logits on two runtimes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_support import Decoder, dequantized_model, session, write_artifact
from plain_rounding import round_to_nearest

from conftest import scheme_per_layer
from roundexport import export
from roundexport.errors import ArtifactError, UnsupportedError, UsageError
from roundexport.families.configurations import families
from roundexport.families.toy import write_model
from roundexport.formats.artifact import Artifact
from roundexport.formats.package import read_package
from roundexport.quant.spec import QuantSpec
from roundexport.runtime import load
from roundexport.targets.onnx import OnnxSettings, read_back
from roundexport.targets.onnx.standard.weight_layout import decode, encode, standard_form

Made = tuple[Artifact, Path]
SCHEMES = (QuantSpec(4, 32), QuantSpec(4, 64, False), QuantSpec(3, 32, False), QuantSpec(8, None))


@pytest.fixture(scope="module")
def made(models: Callable[[str], Path], shared: Callable[..., Path]) -> Made:
    """A tied Qwen3 block with a scheme for each of its products, and its standard package."""
    model = models("qwen3, one block")
    artifact = shared(
        "qwen3-standard-artifact",
        lambda folder: write_artifact(model, folder, scheme_per_layer(SCHEMES, SCHEMES[0]), QuantSpec(4, 32, False)),
    )
    package = shared(
        "qwen3-standard", lambda folder: export(artifact, folder, settings={"dialect": "standard"}, progress=False)
    )
    return Artifact.open(artifact), package


def reference(artifact: Artifact, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return dequantized_model(artifact)(input_ids=torch.tensor(ids)).logits.numpy()


def test_the_graph_is_onnx_alone_and_passes_the_checker(made: Made) -> None:
    path = made[1] / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(path, load_external_data=False)
    assert {entry.domain for entry in graph.opset_import} == {""}
    assert {node.domain for node in graph.graph.node} == {""}
    standard = {schema.name for schema in onnx.defs.get_all_schemas()}
    assert {node.op_type for node in graph.graph.node} <= standard
    manifest = read_package(made[1])
    assert manifest.settings["dialect"] == "standard"
    assert {layer["stored"].partition(",")[0] for layer in manifest.layers.values()} == {
        "INT4",
        "UINT4",
        "INT8",
        "UINT8",
    }


def test_its_integers_are_the_artifacts(made: Made) -> None:
    artifact, package = made
    found = read_back(package)
    assert list(sorted(found)) == sorted(artifact.names())
    assert all(linear.equals(artifact.linear(name)) for name, linear in found.items())


def test_rows_with_holes_and_steps_give_the_models_logits(made: Made) -> None:
    artifact, package = made
    decoder = load(package, precise=True)
    ids = np.random.default_rng(5).integers(4, 384, (2, 12))
    expected = reference(artifact, ids)
    with decoder.start(rows=2) as rows:
        first, second = rows.add(2)
        rows.extend({first: ids[0, :7].tolist(), second: ids[1, :4].tolist()})
        for step in range(5):
            new = {first: [int(ids[0, 7 + step])], second: [int(ids[1, 4 + step])]}
            found = rows.extend(new)
            wanted = np.stack([expected[0, 7 + step], expected[1, 4 + step]])
            assert np.abs(found - wanted).max() < 1e-4 * expected.std()
        copy = rows.fork(first, 6)
        assert np.abs(rows.extend({copy: ids[0, 6:9].tolist()})[0] - expected[0, 8]).max() < 1e-4 * expected.std()


def test_openvinos_onnx_frontend_gives_the_same_logits(made: Made) -> None:
    ov = pytest.importorskip("openvino")
    artifact, package = made
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = ov.Core().compile_model(ov.Core().read_model(package / "model.onnx"), "CPU", exact)
    ids = np.random.default_rng(6).integers(4, 384, (1, 10))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(10)[None]}
    for port in compiled.inputs:
        if port.get_any_name().startswith("past"):
            shape = port.get_partial_shape()
            feeds[port.get_any_name()] = np.zeros((1, shape[1].get_length(), 0, shape[3].get_length()), np.float32)
    expected = reference(artifact, ids)
    assert np.abs(compiled(feeds)["logits"] - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "width"), [(16, 48), (None, 48), (None, 128)])
@pytest.mark.parametrize("looked_up", [True, False])
def test_every_scheme_has_an_exact_form(
    bits: int, symmetric: bool, group: int | None, width: int, looked_up: bool
) -> None:
    weight = np.random.default_rng(bits).standard_normal((5, width)).astype(np.float32)
    linear = round_to_nearest(weight, QuantSpec(bits, group, symmetric))
    form = standard_form(linear.spec, width, looked_up)
    stored = encode(linear, form)
    assert decode(stored, form, linear.spec, weight.shape, "layer").equals(linear)
    assert stored.codes.size == (5 * width * form.bits + 7) // 8


def test_changed_bytes_are_refused(made: Made, tmp_path: Path) -> None:
    artifact, _ = made
    name = "model.layers.0.self_attn.q_proj"
    linear = artifact.linear(name)
    form = standard_form(linear.spec, linear.in_features, False)
    stored = encode(linear, form)
    stored.codes[3] ^= 0x10
    shape = (linear.out_features, linear.in_features)
    assert not decode(stored, form, linear.spec, shape, name).equals(linear)
    stored.scales[0, 0] = 1 / 3
    with pytest.raises(ArtifactError, match="is no float16"):
        decode(stored, form, linear.spec, shape, name)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="standard"):
        OnnxSettings(accuracy_level=0, dialect="standard")
    with pytest.raises(UsageError, match="onnxruntime or standard"):
        OnnxSettings(dialect="klingon")


def test_a_window_counts_tokens_and_not_places(models: Callable[[str], Path], shared: Callable[..., Path]) -> None:
    artifact = shared(
        "gemma3-standard-artifact", lambda out: write_artifact(models("gemma3, one block"), out, QuantSpec(8, 32))
    )
    package = shared(
        "gemma3-standard", lambda out: export(artifact, out, settings={"dialect": "standard"}, progress=False)
    )
    ids = np.random.default_rng(7).integers(4, 384, (1, 14))
    expected = reference(Artifact.open(artifact), ids)
    graph = session(package, 0)
    padded = np.concatenate([np.ones((1, 3), np.int64), ids], 1)  # three places of padding in front
    mask = np.concatenate([np.zeros((1, 3), np.int64), np.ones_like(ids)], 1)
    feed = {"input_ids": padded, "attention_mask": mask, **Decoder(graph, 1).cache, "position_ids": mask.cumsum(1) - 1}
    logits = graph.run(["logits"], feed)[0][:, 3:]
    assert np.abs(logits - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize(
    ("family", "fewer"), [("gpt_oss", {"layer_types": ["sliding_attention"]}), ("deberta_v2", {})], ids=str
)
def test_sinks_experts_and_biases_of_heads_are_standard_too(family: str, fewer: dict[str, Any], tmp_path: Path) -> None:
    row = families()[family]
    write_model(replace(row, values={**row.values, "num_hidden_layers": 1, **fewer}), tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", settings={"dialect": "standard"}, progress=False)
    path = tmp_path / "out" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    assert {node.domain for node in onnx.load(path, load_external_data=False).graph.node} == {""}


def test_what_it_has_no_form_for_is_refused(models: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="nor for encoders with a decoder; take --dialect onnxruntime"):
        export(models("t5, one block"), tmp_path / "out", settings={"dialect": "standard"}, progress=False)
