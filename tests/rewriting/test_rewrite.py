"""An artifact's integers in graphs that other exporters made: every form found, proven, and nothing else changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from foreign_graphs import BLOCK, onnx_graph, openvino_graph, weights
from onnx_support import write_artifact

from conftest import build_model, scheme_per_layer
from roundexport import rewrite
from roundexport.errors import UnsupportedError, UsageError
from roundexport.quant.spec import QuantSpec
from roundexport.rewriting.comparing import _open_onnx
from roundexport.rewriting.rewrite import Rewriting

SCHEMES = (QuantSpec(4, 32), QuantSpec(8, None), QuantSpec(3, 32, False), QuantSpec(2, 64, False))
TABLE = QuantSpec(8, 32)


@pytest.fixture(scope="module")
def model(models: Callable[[str], Path]) -> Path:
    return models("llama, one block")


@pytest.fixture(scope="module")
def artifact(model: Path, shared: Callable[..., Path]) -> Path:
    """One scheme for q, k and v, others for o, gate with up, and down; tables in 8 bits."""
    return shared(
        "rewrite-artifact", lambda folder: write_artifact(model, folder, scheme_per_layer(SCHEMES, TABLE), TABLE)
    )


def rewritten(graph: Path, artifact: Path, out: Path, **settings: object) -> Rewriting:
    return rewrite(graph, artifact, out, progress=False, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("dialect", ["onnxruntime", "standard"])
def test_every_form_of_an_onnx_weight_is_found(model: Path, artifact: Path, tmp_path: Path, dialect: str) -> None:
    graph = onnx_graph(model, tmp_path / "decoder.onnx")
    done = rewritten(graph, artifact, tmp_path / "out", dialect=dialect)
    assert len(done.layers) == 9 and not done.missing
    assert done.outputs.difference < 1e-5 and done.outputs.outputs == 4
    places = {layers: label for _, label, layers in done.places}
    assert places[tuple(f"{BLOCK}.self_attn.{part}_proj" for part in "qkv")] == "MatMul /qkv"
    written = onnx.load(tmp_path / "out" / "decoder.onnx", load_external_data=False)
    kinds = [node.op_type for node in written.graph.node]
    if dialect == "onnxruntime":
        assert kinds.count("MatMulNBits") == 6 and kinds.count("GatherBlockQuantized") == 1
    else:
        onnx.checker.check_model(str(tmp_path / "out" / "decoder.onnx"), full_check=True)
        assert kinds.count("DequantizeLinear") == 8 and {node.domain for node in written.graph.node} == {""}
    assert "Gemm" not in kinds and kinds.count("Tanh") == 1  # the rest stays
    floats = [t.name for t in written.graph.initializer if t.data_type == 1 and not t.name.endswith(".scales")]
    assert floats == ["bias"]
    assert json.loads((tmp_path / "out" / "rewrite.json").read_text())["layers"] == list(done.layers)
    assert done.bytes_after < done.bytes_before


def test_every_form_of_an_openvino_weight_is_found(model: Path, artifact: Path, tmp_path: Path) -> None:
    import openvino as ov

    graph = openvino_graph(model, tmp_path / "openvino_model.xml")
    done = rewritten(graph, artifact, tmp_path / "out")
    assert len(done.layers) == 9 and not done.missing
    assert done.outputs.difference < 1e-5 and done.outputs.outputs == 4
    compiled = ov.Core().compile_model(tmp_path / "out" / "openvino_model.xml", "CPU")
    types = [
        source.get_node().get_rt_info()["outputPrecisions"].astype(str)
        for node in compiled.get_runtime_model().get_ordered_ops()
        if node.get_rt_info()["layerType"].astype(str) == "FullyConnected"
        for source in [node.input_value(1)]
    ]
    assert len(types) == 8 and not {"f32", "f16", "bf16"} & set(types)


def test_a_layer_that_is_not_there_is_an_error_unless_allowed(model: Path, artifact: Path, tmp_path: Path) -> None:
    path = onnx_graph(model, tmp_path / "decoder.onnx", external=False)
    graph = onnx.load(path)
    head = next(tensor for tensor in graph.graph.initializer if tensor.name == "head")
    values = onnx.numpy_helper.to_array(head) * 2
    head.CopyFrom(onnx.numpy_helper.from_array(values, "head"))
    onnx.save(graph, path)
    with pytest.raises(UnsupportedError, match=r"8 layers .* are in the graph, 1 are not.*--partial(.|\n)*lm_head: no"):
        rewritten(path, artifact, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = rewritten(path, artifact, tmp_path / "out", partial=True)
    assert len(done.layers) == 8 and [name for name, _ in done.missing] == ["lm_head"]


def test_a_packed_weight_of_which_a_part_is_float_is_said(model: Path, tmp_path: Path) -> None:
    write_artifact(model, tmp_path / "artifact", QuantSpec(4, 32), keep_float=("v_proj",))
    graph = onnx_graph(model, tmp_path / "decoder.onnx")
    with pytest.raises(UnsupportedError, match="part of packed, of which rows 96 to 127 belong to no tuned layer"):
        rewritten(graph, tmp_path / "artifact", tmp_path / "out")


def test_a_graph_that_computes_in_float16_keeps_its_types(model: Path, artifact: Path, tmp_path: Path) -> None:
    w, half = weights(model), onnx.TensorProto.FLOAT16
    arrays = {"table": w["embed_tokens"].astype(np.float16), "q": w["q_proj"].T.astype(np.float16)}
    make = onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [make("Gather", ["table", "input_ids"], ["hidden"]), make("MatMul", ["hidden", "q"], ["out"])],
        "half",
        [onnx.helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["b", "s"])],
        [onnx.helper.make_tensor_value_info("out", half, ["b", "s", w["q_proj"].shape[0]])],
        [onnx.numpy_helper.from_array(values, name) for name, values in arrays.items()],
    )
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(made, tmp_path / "half.onnx")
    done = rewritten(tmp_path / "half.onnx", artifact, tmp_path / "out", partial=True)
    assert done.layers == ("model.embed_tokens", f"{BLOCK}.self_attn.q_proj") and len(done.missing) == 7
    assert 0 < done.outputs.difference < 1e-2 == done.outputs.tolerance / 5
    written = onnx.load(tmp_path / "out" / "half.onnx", load_external_data=False)
    assert written.graph.output[0].type.tensor_type.elem_type == half


def test_a_tied_table_is_stored_once(tmp_path: Path, models: Callable[[str], Path]) -> None:
    model = build_model("llama", tmp_path / "model", num_hidden_layers=1, tie_word_embeddings=True)
    write_artifact(model, tmp_path / "artifact", QuantSpec(4, 32), QuantSpec(8, 32))
    graph = onnx_graph(model, tmp_path / "decoder.onnx", opset=17)
    done = rewritten(graph, tmp_path / "artifact", tmp_path / "out")
    assert [layers for _, _, layers in done.places].count(("model.embed_tokens",)) == 2
    written = onnx.load(tmp_path / "out" / "decoder.onnx", load_external_data=False)
    assert sum(tensor.name.startswith("model.embed_tokens.codes") for tensor in written.graph.initializer) == 1
    with pytest.raises(UnsupportedError, match="opset is 17, blocked DequantizeLinear needs 21"):
        rewritten(graph, tmp_path / "artifact", tmp_path / "out2", dialect="standard")


def test_floats_that_tuning_changed_are_put_there_too(model: Path, tmp_path: Path) -> None:
    from openvino_tools import make_artifact, usual

    from roundexport.model.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(model)
    name = f"{BLOCK}.input_layernorm.weight"
    artifact = make_artifact(checkpoint, tmp_path / "a", usual, {name: checkpoint.float32(name) * 3}).path
    path = onnx_graph(model, tmp_path / "decoder.onnx", external=False)
    with pytest.raises(UnsupportedError, match=r"tuning changed .*input_layernorm.weight too.*no constant"):
        rewritten(path, artifact, tmp_path / "out")
    graph = onnx.load(path)
    graph.graph.initializer.append(onnx.numpy_helper.from_array(checkpoint.float32(name), "norm"))
    graph.graph.node.append(onnx.helper.make_node("Mul", ["hidden", "norm"], ["normed"]))
    graph.graph.output.append(onnx.helper.make_tensor_value_info("normed", 1, None))
    onnx.save(graph, path)
    done = rewritten(path, artifact, tmp_path / "out")
    assert done.changed_floats == (name,) and done.outputs.outputs == 5
    feeds = {"input_ids": np.array([[3, 4]])}
    before, after = (_open_onnx(folder / "decoder.onnx")[1](feeds)["normed"] for folder in (tmp_path, tmp_path / "out"))
    assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.99 and after.std() > 2.5 * before.std()


def test_a_wrong_graph_is_not_kept(
    model: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from roundexport.rewriting import onnx_graph as target

    real = target.OnnxGraph.dequantize

    def elsewhere(self: target.OnnxGraph, replacements: list, *rest: object) -> None:
        real(self, [r for r in replacements if "o" != r.constant.name], *rest)  # one weight keeps its float values

    monkeypatch.setattr(target.OnnxGraph, "dequantize", elsewhere)
    with pytest.raises(UnsupportedError, match=r"is wrong and is not kept: on onnxruntime .* its output logits"):
        rewritten(onnx_graph(model, tmp_path / "decoder.onnx"), artifact, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_graph_is_said(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a graph"):
        rewritten(tmp_path / "nothing.onnx", artifact, tmp_path / "out")
    with pytest.raises(UsageError, match=r"holds 0 graphs \(none\)"):
        rewritten(tmp_path, artifact, tmp_path / "out")
    (tmp_path / "a.xml").write_text("<net/>")
    with pytest.raises(UsageError, match="has no dialects"):
        rewritten(tmp_path / "a.xml", artifact, tmp_path / "out", dialect="standard")
