"""The compiled OpenVINO graph: fused attention, compressed weights, the names that clients look for."""

from __future__ import annotations

import openvino as ov
import pytest
from openvino._offline_transformations import paged_attention_transformation
from openvino_tools import (
    layer_types,
    original_names,
    stored_in,
)

from conftest import DECODERS, FAMILIES
from roundexport.formats.package import read_package


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_every_tuned_layer_runs_compressed(openvino_packages, family: str) -> None:
    package = openvino_packages(family)
    compressed = {
        name: stored_in(node)
        for node in layer_types(package.compiled)["FullyConnected"]
        for name in original_names(node)
    }
    tables = {n for n in package.artifact.names() if package.artifact.entry(n).info.kind == "embedding"}
    assert family != "mixtral" or "model.layers.0.mlp.experts.3.down_proj" in package.artifact.names()
    stored = {name: layer["stored"] for name, layer in read_package(package.folder).layers.items()}
    for name in set(package.artifact.names()) - tables:
        assert stored[name] in compressed[name], name
    gathers = {name: stored_in(n) for n in layer_types(package.compiled)["Gather"] for name in original_names(n)}
    for name in tables:
        assert stored[name] in gathers[name], name


@pytest.mark.parametrize("family", DECODERS)
def test_attention_is_fused_with_its_state(openvino_packages, family: str) -> None:
    package = openvino_packages(family)
    nodes = layer_types(package.compiled)
    layers = package.report.fusions["attention"]
    assert layers == 2 and len(nodes["ScaledDotProductAttention"]) == layers
    assert len(nodes["RMS" if family != "gpt2" else "MVN"]) == package.report.fusions.get("rms_norm", 5)
    assert len(nodes.get("RoPE", [])) == package.report.fusions.get("rope", 0)
    # Fused with the state, the operator takes the cache itself: no Concat of past and new keys is left.
    assert not [n for n in nodes["ScaledDotProductAttention"] if "Concatenation" in parent_types(n)]


def parent_types(node: ov.Node) -> set[str]:
    parents = [port.get_source_output().get_node() for port in node.inputs()]
    return {parent.get_rt_info()["layerType"].astype(str) for parent in parents}


@pytest.mark.parametrize(("family", "windows"), [*((f, [0, 0]) for f in DECODERS if f != "gemma3"), ("gemma3", [8, 0])])
def test_paged_attention_takes_the_graph_and_its_windows(openvino_packages, family: str, windows: list[int]) -> None:
    model = ov.Core().read_model(openvino_packages(family).folder / "openvino_model.xml")
    paged_attention_transformation(model)
    paged = [node for node in model.get_ordered_ops() if node.get_type_name() == "PagedAttentionExtension"]
    assert [constant_value(node.input_value(10)) for node in paged] == windows  # input 10: sliding_window
    assert "attention_mask" not in {port.get_any_name() for port in model.inputs}


def constant_value(port: ov.Output) -> int:
    """Value of a little constant expression."""
    model = ov.Model([port], [], "constant")
    return int(ov.Core().compile_model(model, "CPU")([])[0].item())


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_and_output_have_the_names_clients_look_for(openvino_packages, family: str) -> None:
    package = openvino_packages(family)
    model = ov.Core().read_model(package.folder / "openvino_model.xml")
    names = [port.get_any_name() for port in model.inputs]
    assert [port.get_node().get_friendly_name() for port in model.inputs] == names
    if package.decodes:
        assert names == ["input_ids", "attention_mask", "position_ids", "beam_idx"]
        result = model.outputs[0]
        assert result.get_any_name() == "logits" and result.get_element_type() == ov.Type.f32
        assert result.get_node().input_value(0).get_node().get_type_name() == "MatMul"
        starts = [node.input_value(0) for node in model.get_ops() if node.get_type_name() == "ReadValue"]
        # openvino_genai knows a cache by exactly one dynamic and one zero dimension of its initial shape.
        assert len(starts) == 4
        assert all([d.is_dynamic for d in port.get_partial_shape()].count(True) == 1 for port in starts)
        assert all(port.get_partial_shape()[2] == ov.Dimension(0) for port in starts)
    else:
        assert names == [n for n in ("input_ids", "attention_mask", "token_type_ids") if n in names]
        assert model.outputs[0].get_any_name() == "last_hidden_state"


def test_a_tied_head_and_its_embedding_read_one_constant(openvino_packages) -> None:
    package = openvino_packages("qwen3")
    model = ov.Core().read_model(package.folder / "openvino_model.xml")
    big = [n for n in model.get_ops() if n.get_type_name() == "Constant" and list(n.shape)[:1] == [384]]
    names = {node.get_friendly_name() for node in big}
    assert names == {"model.embed_tokens.weight", "model.embed_tokens.weight/scale"}
