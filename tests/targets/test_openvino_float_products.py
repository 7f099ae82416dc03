"""Products whose activations stay floats under dynamic quantization: exact, compressed, read back, and said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openvino as ov
import pytest
from onnx_support import record_losses
from openvino import opset15 as ops
from openvino_tools import INT4, INT8_ROW, layer_types, make_artifact, round_to_nearest, stored_in

from roundexport.errors import ArtifactError, UsageError
from roundexport.formats.artifact import Artifact
from roundexport.formats.package import PackageLayer, read_package
from roundexport.kernels import group_matmul
from roundexport.model.checkpoint import Checkpoint
from roundexport.quant.spec import LinearInfo, QuantSpec
from roundexport.reports import story
from roundexport.runtime import loading
from roundexport.runtime.engines._ov_levels import keep_float, products
from roundexport.runtime.machine import machine_info
from roundexport.runtime.types import Product
from roundexport.schemes.activation_loss import ActivationLosses
from roundexport.targets import openvino as target
from roundexport.targets.openvino.constants import stored_type
from roundexport.targets.openvino.float_products import slowdown
from roundexport.targets.openvino.readback import found_layers
from roundexport.targets.openvino.saving import save
from roundexport.targets.openvino.weight import compressed_chain
from roundexport.targets.spared import spared

ROUNDED = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32}


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [64, None])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_float_zero_point_keeps_activations_float(bits: int, group_size: int | None, symmetric: bool) -> None:
    rng = np.random.default_rng(bits)
    linear = round_to_nearest(rng.standard_normal((48, 192), np.float32), QuantSpec(bits, group_size, symmetric))
    values = rng.standard_normal((5, 192), np.float32)
    exact = group_matmul.reference(values, linear)

    def error(float_activations: bool, in_memory: bool = False) -> float:
        stored = stored_type(linear.spec, linear.in_features)
        x = ops.parameter([-1, 192], np.float32, name="x")
        chain = compressed_chain(linear, stored, "layer.weight", float_activations=float_activations)
        model = ov.Model([ops.matmul(x, chain, False, True, name="layer")], [x], "m")
        assert products(model) == (Product("layer", ("layer",), not float_activations),)
        if in_memory:  # as an engine leaves activations of some products floats
            keep_float(model, ())
            assert not products(model)[0].int8
        compiled = ov.Core().compile_model(model, "CPU", ROUNDED)
        (node,) = layer_types(compiled)["FullyConnected"]
        assert (stored.replace("i", "u") if float_activations or in_memory else stored) in stored_in(node)
        return float(np.abs(compiled([values])[0] - exact).max() / np.abs(exact).max())

    assert error(True) < 1e-5 and error(False, in_memory=True) < 1e-5
    if any("VNNI" in name for name in machine_info()["instruction_sets"]):
        assert error(False) > 1e-3  # so that the other is no accident


def test_an_export_keeps_what_the_artifact_records_and_reads_it_back(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(models("llama, one block"))
    folder, out = tmp_path / "artifact", tmp_path / "package"
    artifact = make_artifact(checkpoint, folder, lambda info: INT8_ROW if info.kind == "embedding" else INT4)
    names = [name for name in artifact.names() if artifact.entry(name).info.kind == "linear"]
    record_losses(folder, {name: 0.5 if name.endswith("o_proj") else 1e-5 for name in names})
    out.mkdir()
    report = target.export(Artifact.open(folder), checkpoint, out, target.OpenVinoSettings(activation_time=0.5))
    kept = "model.layers.0.self_attn.o_proj"
    assert any("activations of 1 layers stay floats" in note and kept in note for note in report.notes)
    manifest = read_package(out)
    assert manifest.settings == {"device": "cpu", "max_context": None, "float32_activations": [kept]}
    assert [name for name, layer in manifest.layers.items() if layer["stored"] == "u4"] == [kept]
    told = dict(story.exported(SimpleNamespace(manifest=manifest)))  # type: ignore[arg-type]
    assert told["activations in float32"] == kept
    assert [one.layers for one in loading.products(out, "ov") if not one.int8] == [(kept,)]
    assert target.read_back(out)[kept].equals(artifact.linear(kept))
    with pytest.raises(UsageError, match="share from 0 to 1"):
        target.OpenVinoSettings(activation_time=3.0)


@pytest.mark.parametrize(("number", "message"), [(8.0, None), (8.5, "not codes of"), (7.0, "differs from 8")])
def test_a_float_zero_point_is_read_back(tmp_path: Path, number: float, message: str | None) -> None:
    linear = round_to_nearest(np.random.default_rng(0).standard_normal((8, 64), np.float32), QuantSpec(4, 32))
    x = ops.parameter([-1, 64], np.float32, name="x")
    chain = compressed_chain(linear, "i4", "layer.weight", float_activations=True)
    model, file = ov.Model([ops.matmul(x, chain, False, True)], [x], "m"), tmp_path / "m.xml"
    (zero,) = (node for node in model.get_ops() if node.get_friendly_name() == "layer.weight/zero_point")
    zero.output(0).replace(ops.constant(np.full((1, 1, 1), number, np.float16)).output(0))
    save(model, file)
    layers: dict[str, PackageLayer] = {"layer": {"bits": 4, "group_size": 32, "symmetric": True, "stored": "u4"}}
    if message is None:
        ((_, found),) = found_layers(file, layers)
        assert found.linear.equals(linear)
        return
    with pytest.raises(ArtifactError, match=message):
        list(found_layers(file, layers))


def test_a_tied_head_can_be_spared_in_eight_bits() -> None:
    layers = {
        "embed": (LinearInfo("embed", 64, 1024, "embedding", ("lm_head",)), QuantSpec(8, 64)),
        "down": (LinearInfo("down", 128, 64), QuantSpec(4, 32)),
        "two": (LinearInfo("two", 64, 64), QuantSpec(2, 32)),
    }
    found = ActivationLosses({"lm_head": 0.5, "down": 0.4, "two": 0.4}, ())
    assert spared(found, layers, 1.0, slowdown).layers == ("embed", "down")
    assert [slowdown(*layer) for layer in layers.values()] == [1.4, 2.0, None]
