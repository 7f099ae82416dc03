"""Accuracy control of 8-bit packages: what goes back to floats, in which order, and how a graph reads floats again."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from roundexport.errors import UsageError
from roundexport.targets.onnx.w8a8 import quantize
from roundexport.targets.openvino.w8a8_reverted import reverted
from roundexport.targets.w8a8_control import Allowance, cosines, reverted_until, sentence_vector

LOSSES = {"a": 0.001, "b": 0.02, "c": 0.005}


@pytest.mark.parametrize(
    ("least", "reverted"), [(0.97, ()), (0.98, ("b",)), (0.9935, ("b",)), (0.998, ("b", "c")), (1, ("b", "c", "a"))]
)
def test_the_worst_go_first_and_no_more_than_needed(least: float, reverted: tuple[str, ...]) -> None:
    def figure(floats: Collection[str]) -> float:
        return 1 - sum(loss for name, loss in LOSSES.items() if name not in floats)

    found, reached = reverted_until(tuple(LOSSES), figure, least)
    assert found == reverted and reached == figure(reverted) >= least


def test_ranges_and_figure_have_samples_of_their_own() -> None:
    allowance = Allowance(np.arange(200)[:, None])
    assert len(allowance.for_ranges) == 150 and len(allowance.for_figure) == 32
    assert not set(allowance.for_ranges.ravel()) & set(allowance.for_figure.ravel())
    few = Allowance(np.arange(3)[:, None])
    assert len(few.for_ranges) == len(few.for_figure) == 3
    with pytest.raises(UsageError, match="below 1"):
        Allowance(np.zeros((1, 1), np.int64), 1.0)


def test_vectors_that_are_not_finite_are_as_far_as_can_be() -> None:
    vector = sentence_vector(np.array([[[3.0, 0], [3, 8]]]))
    assert cosines([vector, vector * np.nan], [vector, vector]) == [pytest.approx(1), -1]


def _weights() -> dict[str, NDArray[np.float32]]:
    """A table, an easy product and one whose input has an outlier that takes all the steps of eight bits."""
    random = np.random.default_rng(3)
    table = random.standard_normal((50, 16)).astype(np.float32)
    table[:, 3] = 1
    spread = np.eye(16, dtype=np.float32)
    spread[3, 3] = 3000
    hard = random.standard_normal((16, 8)).astype(np.float32)
    hard[3] = 0
    return {"table.weight": table, "easy.weight": spread, "hard.weight": hard}


def _onnx_package(folder: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table.weight", "input_ids"], ["x"], name="table"),
            helper.make_node("MatMul", ["x", "easy.weight"], ["y"], name="easy"),
            helper.make_node("MatMul", ["y", "hard.weight"], ["last_hidden_state"], name="hard"),
        ],
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "t"])],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["b", "t", 8])],
        [numpy_helper.from_array(values, name) for name, values in _weights().items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "model.onnx")


def test_onnx_reverts_what_rounding_ruins(tmp_path: Path) -> None:
    _onnx_package(tmp_path)
    ids = np.random.default_rng(4).integers(0, 50, (16, 6))
    before = ort.InferenceSession(tmp_path / "model.onnx").run(None, {"input_ids": ids})[0]
    done = quantize(tmp_path, "model.onnx", Allowance(ids, 0.99))
    assert done.reverted == ("hard",) and done.layers == ("table", "easy") and 0.99 <= done.cosine < 1
    after = ort.InferenceSession(tmp_path / "model.onnx").run(None, {"input_ids": ids})[0]
    assert 0 < np.abs(after - before).max() < 0.1 * np.abs(before).max()
    graph = onnx.load(tmp_path / "model.onnx").graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2}
    assert kinds["hard.weight"] == TensorProto.FLOAT and sorted(kinds.values()) == [1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) in (["model.onnx"], ["model.onnx", "model.onnx.data"])


def test_openvino_reverts_to_the_float_graph(tmp_path: Path) -> None:
    """By hand what NNCF makes: inputs smoothed and rounded, weights scaled to match, the bias corrected."""
    ops = ov.opset13
    ids = ops.parameter([-1, -1], np.int64)

    def graph(smooth: float, correction: float) -> ov.Model:
        found = ops.gather(ops.constant(_weights()["table.weight"]), ids, ops.constant(0))
        if correction:
            found = ops.multiply(found, ops.constant(np.float32(1 / smooth)), name="x/nncf_smooth_quant")
            found = ops.fake_quantize(found, *(ops.constant(np.float32(edge)) for edge in (-1, 1, -1, 1)), 256)
        weight = ops.constant(_weights()["hard.weight"] * np.float32(smooth))
        found = ops.matmul(found, weight, False, False, name="hard/product")
        return ov.Model([ops.result(ops.add(found, ops.constant(np.float32([correction] * 8)), name="bias"))], [ids])

    floats, rounded = graph(1, 0), graph(4, 0.5)
    samples = np.random.default_rng(4).integers(0, 50, (4, 6))
    wanted, lossy, back = (
        ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(samples)[0]
        for model in (floats, rounded, reverted(rounded, floats, {"MatMul": 1}, {"hard/product"}))
    )
    assert np.array_equal(back, wanted) and np.abs(lossy - wanted).max() > 0.4
