"""`--recipe bct` on both targets: the artifact's integers in four bits, multiplied as the reference multiplies them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
import pytest

from roundexport.errors import ArtifactError, UnsupportedError
from roundexport.formats.artifact import Artifact
from roundexport.integer_encoder.artifact import write_artifact
from roundexport.integer_encoder.calibrate import IntegerSettings, calibrate
from roundexport.integer_encoder.float_encoder import FloatEncoder
from roundexport.integer_encoder.rounders import ForIntegers
from roundexport.kernels import integer_linear
from roundexport.kernels._block_format import Format
from roundexport.kernels.integer_encoder import IntegerEncoder
from roundexport.kernels.integer_linear import IntegerLinear
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.integer_inputs import INPUT_SPREAD, recorded, refuse_unfit
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec
from roundexport.runtime.loading import load
from roundexport.targets.export import export
from roundexport.targets.onnx.integer_linears import INTEGERS_KEY

IDS = np.random.default_rng(3).integers(4, 384, (2, 10))
INPUTS = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "token_type_ids": np.zeros_like(IDS)}


@pytest.fixture(scope="module")
def made(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, IntegerEncoder]:
    """An artifact of the recipe, and the integer encoder in it."""
    checkpoint = Checkpoint.open(str(models("bert")))
    floats, settings = FloatEncoder.of(checkpoint), IntegerSettings(input_spread=INPUT_SPREAD)
    ids = np.random.default_rng(0).integers(4, 384, (8, 12))
    integers = calibrate(floats, ids, ForIntegers(), settings)
    folder = tmp_path_factory.mktemp("bct") / "artifact"
    write_artifact(integers, floats, checkpoint, folder, settings, {"kind": "none"})
    return folder, integers


@pytest.fixture(scope="module")
def packages(
    made: tuple[Path, IntegerEncoder], models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A package for each target; export reads integers back and compares outputs."""
    folder = tmp_path_factory.mktemp("packages")
    for target in ("onnx", "openvino"):
        report = export(made[0], folder / target, to=target, model=models("bert"), progress=False)
        assert report.fusions["8-bit inputs"] == (8 if target == "onnx" else 12), report
        assert report.outputs is not None and report.outputs.difference <= report.outputs.tolerance
    return {target: folder / target for target in ("onnx", "openvino")}


def linears(encoder: IntegerEncoder) -> Iterator[IntegerLinear]:
    for block in encoder.blocks:
        yield from (block.query, block.key, block.value, block.output, block.up, block.down)


def test_the_artifact_records_the_formats_that_linears_read(made: tuple[Path, IntegerEncoder]) -> None:
    formats = recorded(Artifact.open(made[0]))
    assert len(formats) == 12
    for linear in linears(made[1]):
        found = formats[linear.name]
        assert np.array_equal(found.exponents, linear.entering.exponents)
        assert np.ptp(found.exponents) <= INPUT_SPREAD
    spread = [int(np.ptp(found.exponents)) for found in formats.values()]
    assert max(spread) > 0


def test_onnx_multiplies_the_integers_of_the_reference(
    made: tuple[Path, IntegerEncoder], packages: dict[str, Path], tmp_path: Path
) -> None:
    """Every product's codes and results are looked at inside the graph: equal to the last bit of a float32."""
    model = onnx.load(packages["onnx"] / "model.onnx")
    kinds = Counter(tensor.data_type for tensor in model.graph.initializer)
    assert kinds[onnx.TensorProto.INT4] == 8
    products = [node for node in model.graph.node if node.op_type == "MatMulIntegerToFloat"]
    for node in products:
        model.graph.output.append(onnx.helper.make_tensor_value_info(node.input[0], onnx.TensorProto.UINT8, None))
        model.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, INPUTS), strict=True))
    by_name = {linear.name: linear for linear in linears(made[1])}
    for node in products:
        layers = [by_name[name] for name in _layers(node)]
        codes = found[node.input[0]].astype(np.int32) - 128
        expected = np.concatenate([_values(codes, linear) for linear in layers], -1)
        assert np.array_equal(found[node.output[0]], expected), node.name


def test_openvino_multiplies_the_integers_of_the_reference(
    made: tuple[Path, IntegerEncoder], packages: dict[str, Path]
) -> None:
    """Every product's codes and results are outputs of this graph: equal to the last bit, and it runs in i8 itself."""
    model = ov.Core().read_model(packages["openvino"] / "openvino_model.xml")
    nodes = {node.get_friendly_name(): node for node in model.get_ops()}
    entered = {linear.name: nodes[f"{linear.name}/product"].input_value(0) for linear in linears(made[1])}
    assert {port.get_node().get_type_name() for port in entered.values()} == {"FakeQuantize"}
    sources = {name: port.get_node().get_friendly_name() for name, port in entered.items()}  # siblings share one
    for name in sorted(set(sources.values())) + list(sources):
        model.add_outputs([nodes[name].output(0)])
    names = [port.get_node().input_value(0).get_node().get_friendly_name() for port in model.outputs]
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert set(_precisions(compiled)) == {"i8"}
    given = compiled({port.get_any_name(): INPUTS[port.get_any_name()] for port in compiled.inputs})
    found = {name: given[port] for name, port in zip(names, compiled.outputs, strict=True)}
    for linear in linears(made[1]):
        codes = np.rint(found[sources[linear.name]] / 2.0 ** int(linear.entering.exponents.min())).astype(np.int32)
        assert np.array_equal(found[linear.name], _values(codes, linear)), linear.name


def _precisions(compiled: ov.CompiledModel) -> Counter[str]:
    """What the matrix products of a compiled graph run in."""
    return Counter(
        node.get_rt_info()["runtimePrecision"].astype(str)
        for node in compiled.get_runtime_model().get_ops()
        if node.get_rt_info()["layerType"].astype(str) == "FullyConnected"
    )


def test_openvino_runs_them_in_eight_bits(packages: dict[str, Path]) -> None:
    core = ov.Core()
    compiled = core.compile_model(core.read_model(packages["openvino"] / "openvino_model.xml"), "CPU")
    assert set(_precisions(compiled)) == {"i8"}


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_hidden_states_are_near_the_simulation(
    made: tuple[Path, IntegerEncoder], packages: dict[str, Path], target: str
) -> None:
    """What the runtimes keep as floats (attention, GELU, norms) is all that differs."""
    import torch

    from roundexport.integer_encoder import shifts
    from roundexport.kernels import integer_encoder

    codes = integer_encoder.run(*(torch.from_numpy(INPUTS[name]) for name in INPUTS), made[1])
    simulated = shifts.values_of(codes, made[1].leaving).numpy()
    shipped: Any = load(packages[target])
    given = shipped.output(INPUTS)
    assert float((given * simulated).sum() / np.sqrt(np.square(given).sum() * np.square(simulated).sum())) > 0.98


def test_an_artifacts_formats_are_held_against_its_layers(made: tuple[Path, IntegerEncoder]) -> None:
    artifact = Artifact.open(made[0])
    inputs = artifact.manifest.algorithm["settings"]["inputs"]
    name = next(iter(inputs))
    for wrong in ([], [0.5], [99], [0] * 7, "x"):
        inputs[name] = wrong
        with pytest.raises(ArtifactError, match="not a list of exponents"):
            recorded(artifact)


@pytest.mark.parametrize(
    ("spec", "apart", "reason"),
    [
        (QuantSpec(8, None, True, "exponent8"), 0, "go with four symmetric bits"),
        (QuantSpec(4, None, True, "float32"), 0, "go with four symmetric bits"),
        (QuantSpec(4, 16, True, "exponent8"), 0, "one scale a row, not 2"),
        (QuantSpec(4, None, True, "exponent8"), 4, "reach 128, more than eight bits hold"),
    ],
)
def test_what_does_not_fit_eight_bits_is_refused(spec: QuantSpec, apart: int, reason: str) -> None:
    codes = np.zeros((2, spec.row_bytes(32)), np.uint8)
    linear = QuantizedLinear(spec, 32, codes, np.ones((2, spec.groups(32)), np.float32))
    with pytest.raises(UnsupportedError, match=reason):
        refuse_unfit("up", linear, Format(32, np.array([0, apart], np.int8)))


def _layers(node: onnx.NodeProto) -> list[str]:
    import json

    said = {entry.key: entry.value for entry in node.metadata_props}
    assert INTEGERS_KEY in said
    return [row[0] for row in json.loads(said["roundexport.layers"])]


def _values(codes: np.ndarray, linear: IntegerLinear) -> np.ndarray:
    """What the reference's sums mean, with the bias as it is stored."""
    sums = integer_linear.accumulate(codes, linear) - linear.aligned_bias
    scaled = np.ldexp(sums.astype(np.float32), linear.exponents)
    return scaled + linear.bias.values().astype(np.float32)
