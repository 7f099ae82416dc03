"""TEQ: trained factors beat rounding alone, leave the float block what it was, and reach both targets' graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import build_model, tuned
from roundexport.algorithms import _equivalent, rtn, teq, teq_model
from roundexport.artifact import Artifact
from roundexport.artifactwriter import ArtifactWriter, artifact_source
from roundexport.blockcalls import capture_calls, first_hidden
from roundexport.blocks import Stack, find_stack, linears, weight_of
from roundexport.calibration import load_calibration
from roundexport.checkpoint import Checkpoint
from roundexport.errors import Interrupted, RoundexportError, UnsupportedError, UsageError, WontFitError
from roundexport.folding import find_pairs, fold
from roundexport.kernels import fake_quant
from roundexport.methods import BlockInputs
from roundexport.spec import LinearInfo, QuantSpec
from roundexport.vectors import Vector8

Models = Callable[[str], Path]
ROW3 = QuantSpec(3, None, symmetric=False)
QUICK = teq.Settings(steps=12, batch_size=4)


def sample_ids(rows: int, length: int = 16) -> Tensor:
    return torch.randint(4, 380, (rows, length), generator=torch.Generator().manual_seed(0))


def loaded(folder: Path, rows: int = 8) -> tuple[nn.Module, Stack, Tensor]:
    """A model whose weights' columns differ in size, as real ones' do, so that there is something to gain."""
    model = Checkpoint.open(folder).load_model().requires_grad_(False)
    stack = find_stack(model)
    generator = torch.Generator().manual_seed(5)
    for block in stack.blocks:
        for module in linears(block).values():
            weight = weight_of(module)
            weight.mul_(torch.randn(weight.shape[1], generator=generator).exp())
    return model, stack, sample_ids(rows)


def first_inputs(model: nn.Module, stack: Stack, ids: Tensor) -> BlockInputs:
    call, hidden = capture_calls(model, stack, ids)[0], first_hidden(model, stack, ids, 4)
    mask = torch.ones(ids.shape)
    mask[:, -1] = 0
    return BlockInputs(call, hidden, hidden, call.run(stack.blocks[0], hidden), mask, seed=3)


def rounded_loss(block: nn.Module, inputs: BlockInputs, specs: dict[str, QuantSpec]) -> float:
    """Squared error of the block's output with its weights rounded to nearest."""
    layers = rtn.tune_block(block, None, specs, rtn.Settings()).layers
    weights = {name: torch.from_numpy(linear.dequantize()) for name, linear in layers.items()}
    return float((inputs.call.run(block, inputs.quantised, weights) - inputs.target)[:, :-1].square().mean())


@pytest.mark.parametrize(("family", "start"), [("llama", "ones"), ("gpt2", "grid")])
def test_rounding_costs_less_and_the_float_block_is_what_it_was(family: str, start: str, models: Models) -> None:
    model, stack, ids = loaded(models(family))
    block, inputs = stack.blocks[0], first_inputs(model, stack, ids)
    specs = dict.fromkeys(linears(block), ROW3)
    before, state = rounded_loss(block, inputs, specs), {n: t.clone() for n, t in block.state_dict().items()}
    changed = teq.transform_block(block, inputs, specs, dataclasses.replace(QUICK, start=start, learning_rate=0.05))
    assert rounded_loss(block, inputs, specs) < 0.8 * before
    torch.testing.assert_close(inputs.call.run(block, inputs.floats), inputs.target, rtol=1e-4, atol=1e-4)
    moved = {name for name, tensor in block.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed.keys() == moved - {f"{name}.weight" for name in specs}
    assert all(torch.equal(changed[name], block.get_parameter(name)) for name in changed)


def test_weights_without_a_scheme_stay_float_and_are_handed_back(models: Models) -> None:
    model, stack, ids = loaded(models("llama"))
    block, inputs = stack.blocks[0], first_inputs(model, stack, ids)
    specs = dict.fromkeys(set(linears(block)) - {"mlp.gate_proj", "self_attn.v_proj"}, ROW3)
    changed = teq.transform_block(block, inputs, specs, QUICK)
    assert {"mlp.gate_proj.weight", "self_attn.v_proj.weight", "post_attention_layernorm.weight"} <= changed.keys()


def test_same_seed_same_bits(models: Models) -> None:
    found, settings = [], dataclasses.replace(QUICK, steps=3)
    for _ in range(2):
        model, stack, ids = loaded(models("llama"))
        inputs = first_inputs(model, stack, ids)
        teq.transform_block(stack.blocks[0], inputs, dict.fromkeys(linears(stack.blocks[0]), ROW3), settings)
        found.append(stack.blocks[0].state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_where_nothing_helps_nothing_changes(models: Models) -> None:
    model, stack, ids = loaded(models("llama"))
    block, inputs = stack.blocks[0], first_inputs(model, stack, ids)
    specs = dict.fromkeys(linears(block), ROW3)
    layers = rtn.tune_block(block, None, specs, rtn.Settings()).layers
    weights = {name: torch.from_numpy(linear.dequantize()) for name, linear in layers.items()}
    reached = dataclasses.replace(inputs, target=inputs.call.run(block, inputs.quantised, weights))
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    assert teq.transform_block(block, reached, specs, QUICK) == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
def test_trained_on_the_whole_model_its_loss_falls_and_its_logits_stay(loss: str, models: Models) -> None:
    model, stack, ids = loaded(models("llama"))
    ids = ids[:, :1]
    for _ in range(15):  # the model's likeliest text, which rounding makes less likely
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    specs = [dict.fromkeys(linears(block), ROW3) for block in stack.blocks]
    expected, before = model(input_ids=ids).logits, model_loss(model, stack, ids, loss)
    settings = teq_model.Settings(steps=15, batch_size=4, learning_rate=0.05, loss=loss)
    factors, hidden = (
        teq_model.train_model(model, stack, ids, specs, settings, seed=1),
        first_hidden(model, stack, ids, 8),
    )
    assert factors.loss_after < factors.loss_before == pytest.approx(before, rel=1e-4)
    for index, (block, call) in enumerate(zip(stack.blocks, capture_calls(model, stack, ids), strict=True)):
        behind = call.run(block, hidden)
        inputs = BlockInputs(call, hidden, hidden, behind, torch.ones(ids.shape))
        changed = teq_model.fold_block(block, inputs, specs[index], factors.blocks[index])
        assert changed and all(name.endswith("norm.weight") for name in changed)
        hidden = behind
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
    assert model_loss(model, stack, ids, loss) < before


def model_loss(model: nn.Module, stack: Stack, ids: Tensor, kind: str) -> float:
    """Loss of the model with its blocks' weights rounded to nearest."""
    weights = {
        f"{stack.block_name(index)}.{name}.weight": torch.from_numpy(rtn.quantize(weight_of(module), ROW3).dequantize())
        for index, block in enumerate(stack.blocks)
        for name, module in linears(block).items()
    }
    with torch.no_grad():
        found = torch.func.functional_call(model, weights, kwargs={"input_ids": ids}).logits[:, :-1].log_softmax(-1)
        wanted = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    if kind == "kl":
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())
    return -float(found.gather(-1, ids[:, 1:, None]).mean())


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_slope_reaches_through_scale_and_zero_point(symmetric: bool) -> None:
    spec = QuantSpec(4, None, symmetric)
    weight = torch.randn(3, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
    slope = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    (found,) = torch.autograd.grad(_equivalent.FakeQuant.apply(weight, spec, True), weight, slope)

    def through(x: Tensor) -> Tensor:  # the same in plain operations, rounding taken as the identity
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        if symmetric:
            scale = torch.where(high < -low, -low, -high) / spec.midpoint
            codes = (x / scale + ((x / scale).round() - x / scale).detach()).clamp(-spec.midpoint, spec.midpoint - 1)
            return codes * scale
        scale = (high - low) / spec.max_code
        zero = -low / scale + ((-low / scale).round() + low / scale).detach()
        codes = x / scale + ((x / scale).round() - x / scale).detach() + zero
        return (codes.clamp(0, spec.max_code) - zero) * scale

    (expected,) = torch.autograd.grad(through(weight), weight, slope)
    # The stored scale is rounded to float16, 2**-11 of it, and what it multiplies is up to 16 codes.
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    (plain,) = torch.autograd.grad(_equivalent.FakeQuant.apply(weight, spec, False), weight, slope)
    assert torch.equal(plain, slope) and not torch.allclose(found, slope, atol=0.1)


def test_rounded_values_are_those_of_the_rounding_method() -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    expected = rtn.quantize(weight, QuantSpec(3, 32, False)).dequantize()
    np.testing.assert_array_equal(_equivalent.FakeQuant.apply(weight, QuantSpec(3, 32, False), True).numpy(), expected)
    assert fake_quant.available() is None


def test_a_loss_that_is_no_number_is_an_error(models: Models) -> None:
    model, stack, ids = loaded(models("llama"))
    inputs = first_inputs(model, stack, ids)
    broken = dataclasses.replace(inputs, target=inputs.target * float("nan"))
    with pytest.raises(RoundexportError, match="not a finite number"):
        teq.transform_block(stack.blocks[0], broken, dict.fromkeys(linears(stack.blocks[0]), ROW3), QUICK)


BAD = [("steps", -1), ("batch_size", 0), ("learning_rate", 0.0)]


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        (teq, "start", "best"),
        (teq_model, "loss", "mse"),
        *((teq, *bad) for bad in BAD),
        *((teq_model, *b) for b in BAD),
    ],
)
def test_settings_without_sense_are_refused(method: ModuleType, name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        method.Settings(**{name: value})


class Transformed:
    """A model folded with random factors, some of it rounded, as an artifact with overrides and as torch's model."""

    def __init__(self, folder: Path, out: Path, keep_float: str) -> None:
        checkpoint = Checkpoint.open(folder)
        self.ids = sample_ids(2)
        self.model = checkpoint.load_model().requires_grad_(False)
        self.plain = self.model(input_ids=self.ids).logits.numpy()
        stack = find_stack(self.model)
        calls, hidden = capture_calls(self.model, stack, self.ids), first_hidden(self.model, stack, self.ids, 2)
        layers, rounded, changed = [], {}, set()
        for index, (block, call) in enumerate(zip(stack.blocks, calls, strict=True)):
            pairs, prefix = find_pairs(block, call, hidden), f"{stack.block_name(index)}."
            generator = torch.Generator().manual_seed(index)
            alphas = [torch.randn(pair.width, generator=generator).mul(0.5).exp() for pair in pairs]
            changed |= {prefix + name for name in fold(block, pairs, alphas)}
            for name, module in linears(block).items():
                if keep_float not in name:
                    rounded[prefix + name] = rtn.quantize(weight_of(module), QuantSpec(8, 32))
                    rows, width = weight_of(module).shape
                    layers.append((LinearInfo(prefix + name, width, rows), QuantSpec(8, 32)))
                    weight_of(module).copy_(torch.from_numpy(rounded[prefix + name].dequantize()))
        self.overrides = changed - {f"{name}.weight" for name in rounded}
        out.mkdir()
        writer = ArtifactWriter(out, layers)
        for name, linear in rounded.items():
            writer.add(name, linear)
        for name in sorted(self.overrides):
            writer.add_override(name, self.model.get_parameter(name).numpy())
        writer.finish(
            source=artifact_source(checkpoint), algorithm={"name": "rtn", "settings": {}}, calibration={}, versions={},
            side_files=checkpoint.copy_side_files(out),
        )  # fmt: skip
        self.artifact, self.checkpoint = Artifact.open(out), checkpoint
        self.expected = self.model(input_ids=self.ids).logits.numpy()


# One block, as every operation of a graph takes its time in an export.
ONE_BLOCK: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 1},
    "gpt2": {"n_layer": 1},
    "gemma3": {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
}
# GPT-2 has biases on norms and linears, and transposed weights; Gemma multiplies with 1 + w.
FOLDED = {
    "llama": ("gate_proj", {"input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate_proj.weight"}),
    "gpt2": ("c_fc", {"ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "attn.c_attn.bias", "mlp.c_fc.weight"}),
    "gemma3": ("o_proj", {"input_layernorm.weight", "pre_feedforward_layernorm.weight", "self_attn.o_proj.weight"}),
}  # fmt: skip


QUICK_PAIRS = {("onnx", "llama"), ("openvino", "gpt2")}


@pytest.mark.parametrize(
    ("target", "family"),
    [
        pytest.param(target, family, marks=() if (target, family) in QUICK_PAIRS else pytest.mark.slow)
        for target in ("onnx", "openvino")
        for family in FOLDED
    ],
)
def test_folded_norms_biases_and_float_weights_reach_the_graph(target: str, family: str, tmp_path: Path) -> None:
    keep_float, names = FOLDED[family]
    made = Transformed(build_model(family, tmp_path / "model", **ONE_BLOCK[family]), tmp_path / "artifact", keep_float)
    assert {name.split(".", 3)[3] for name in made.overrides} == names
    # Eight bits and folding change little; a norm that was forgotten changes everything.
    assert np.abs(made.expected - made.plain).max() < 0.1 * np.abs(made.plain).max()
    found = logits(target, made, tmp_path / "package")
    difference = np.abs(found - made.expected).max() / np.abs(made.expected).max()
    assert difference < 1e-4, f"{difference:.1e}"  # float32 throughout: the order of sums is all that differs


def logits(target: str, made: Transformed, out: Path) -> np.ndarray:
    """Logits of the exported package, computed in float32."""
    out.mkdir()
    mask = np.ones(made.ids.shape, np.int64)
    if target == "onnx":
        onnx_support = pytest.importorskip("onnx_support")
        from roundexport.targets import onnx

        onnx.export(made.artifact, made.checkpoint, out, onnx.Settings())
        return onnx_support.Decoder(onnx_support.session(out, 0), len(mask)).run(made.ids.numpy(), mask)
    tools = pytest.importorskip("openvino_tools")
    import openvino as ov

    from roundexport.targets import openvino

    openvino.export(made.artifact, made.checkpoint, out, openvino.Settings())
    compiled = ov.Core().compile_model(out / "openvino_model.xml", "CPU", tools.EXACT)
    positions = np.arange(mask.shape[1])[None].repeat(len(mask), 0)
    feed = {"input_ids": made.ids.numpy(), "attention_mask": mask, "position_ids": positions}
    return tools.run_steps(compiled, feed, [])


TUNING = {
    "algorithm": "rtn", "transform": "teq", "bits": 3, "group_size": None, "num_samples": 6, "sample_len": 24,
    "steps": 6, "batch_size": 3, "embedding_bits": None,
}  # fmt: skip


def test_an_artifact_carries_the_changed_norms_and_the_integers_of_the_changed_weights(
    models: Models, calibration_text: Path, tmp_path: Path
) -> None:
    folder = tuned(models("llama"), tmp_path / "out", calibration=str(calibration_text), **TUNING)
    artifact, model = Artifact.open(folder), Checkpoint.open(models("llama")).load_model().requires_grad_(False)
    overrides = artifact.overrides()
    assert overrides and all(name.endswith("layernorm.weight") for name in overrides)
    assert artifact.manifest.algorithm["settings"]["transform"]["name"] == "teq"
    # W' / W = α over the columns that a norm feeds, and the norm's own weight changed by 1 / α.
    for name in overrides:
        reader = "self_attn.q_proj" if name.endswith("input_layernorm.weight") else "mlp.gate_proj"
        linear = f"{name.rsplit('.', 2)[0]}.{reader}"
        alpha = model.get_parameter(name) / torch.tensor(overrides[name])
        assert float((alpha.log().abs()).max()) > 0.01
        expected = rtn.quantize(weight_of(model.get_submodule(linear)) * alpha, ROW3).dequantize()
        found = artifact.linear(linear).dequantize()
        # α is read back here with a rounding or two, which can push a weight over the edge between two codes.
        assert (np.abs(found - expected) > 1e-3 * np.abs(expected).max()).mean() < 0.002


def test_a_run_stopped_between_blocks_goes_on_to_the_same_bytes(
    models: Models, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tuned(models("gpt2"), tmp_path / "whole", calibration=str(calibration_text), **TUNING)
    original, calls = teq.transform_block, []

    def stopping(*args: Any) -> dict[str, Tensor]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(teq, "transform_block", stopping)
    with pytest.raises(Interrupted, match="stopped after 1 of 2 blocks"):
        tuned(models("gpt2"), tmp_path / "out", calibration=str(calibration_text), **TUNING)
    out = tuned(models("gpt2"), tmp_path / "out", calibration=str(calibration_text), **TUNING)
    assert len(calls) == 3, "the first block was not tuned again"
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in out.iterdir()) and "overrides.safetensors" in names
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in names)
    blocks = {name.split(".")[2] for name in Artifact.open(out).overrides()}
    assert blocks == {"0", "1"}


def test_a_rounding_method_is_no_transformation(models: Models, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'rtn' does not transform"):
        tuned(models("llama"), tmp_path / "out", **{**TUNING, "transform": "rtn"})


WHOLE = {**TUNING, "transform": "teq_model", "steps": 40, "num_samples": 16}


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def stop_at_second_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the rounding of the second block, once."""
    original, calls = rtn.tune_block, []

    def stopping(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(rtn, "tune_block", stopping)


def divergence(artifact: Artifact, folder: Path, ids: Tensor) -> float:
    """KL of the artifact's next-token distribution from the float model's, nats per token."""
    model = Checkpoint.open(folder).load_model().requires_grad_(False)
    wanted = model(input_ids=ids).logits.log_softmax(-1)
    for name in artifact.names():
        weight_of(model.get_submodule(name)).copy_(torch.from_numpy(artifact.linear(name).dequantize()))
    for name, values in artifact.overrides().items():
        model.get_parameter(name).copy_(torch.tensor(values))
    return float((wanted.exp() * (wanted - model(input_ids=ids).logits.log_softmax(-1))).sum(-1).mean())


@pytest.mark.slow
def test_factors_of_all_blocks_trained_once_make_a_better_artifact_and_survive_an_interruption(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, trained = teq_model.train_model, []

    def counting(*args: Any) -> Any:
        trained.append(1)
        return original(*args)

    monkeypatch.setattr(teq_model, "train_model", counting)
    plain = Artifact.open(tuned(models("llama"), tmp_path / "plain", **{**WHOLE, "transform": "none"}))
    whole = tuned(models("llama"), tmp_path / "whole", progress=True, **WHOLE)
    assert "teq_model   loss" in capsys.readouterr().err
    artifact = Artifact.open(whole)
    recorded = artifact.manifest.algorithm["settings"]["transform"]
    assert recorded["name"] == "teq_model" and recorded["losses"][1] < recorded["losses"][0]
    assert {name.split(".")[2] for name in artifact.overrides()} == {"0", "1"}
    # Other text of the same kind: on what the model would never say, ids at random, little is gained.
    others = load_calibration(Checkpoint.open(models("llama")), "self", num_samples=32, sample_len=24, seed=7)
    found = [divergence(each, models("llama"), torch.from_numpy(others.ids)) for each in (artifact, plain)]
    assert found[0] < 0.8 * found[1]
    stop_at_second_block(monkeypatch)
    with pytest.raises(Interrupted, match="stopped after 1 of 2 blocks"):
        tuned(models("llama"), tmp_path / "out", **WHOLE)
    assert same_files(whole, tuned(models("llama"), tmp_path / "out", **WHOLE))
    assert len(trained) == 2, "the run that went on trained again"


def test_training_a_whole_model_is_refused_where_it_does_not_fit_or_is_no_decoder(
    models: Models, calibration_text: Path, tmp_path: Path
) -> None:
    with pytest.raises(WontFitError, match="teq_model trains the whole model in memory"):
        tuned(models("llama"), tmp_path / "out", max_ram=0.05, **WHOLE)
    with pytest.raises(UnsupportedError, match="only decoders"):
        tuned(models("bert"), tmp_path / "out", calibration=str(calibration_text), **WHOLE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("transform", ["teq", pytest.param("teq_model", marks=pytest.mark.slow)])
def test_eight_bit_vectors_of_changed_norms_survive_an_interruption(
    transform: str, models: Models, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**TUNING, "transform": transform, "everything": True, "embedding_bits": 8, "steps": 3, "num_samples": 3}
    settings["calibration"] = str(calibration_text)
    whole = tuned(models("gpt2"), tmp_path / "whole", **settings)
    stop_at_second_block(monkeypatch)
    with pytest.raises(Interrupted, match="stopped after 1 of 2 blocks"):
        tuned(models("gpt2"), tmp_path / "out", **settings)
    assert same_files(whole, tuned(models("gpt2"), tmp_path / "out", **settings))
    vectors, model = Artifact.open(whole).vectors(), Checkpoint.open(models("gpt2")).load_model()
    for index in (0, 1):  # the first block was done before the interruption
        name = f"transformer.h.{index}.ln_1.weight"
        rounded = Vector8.nearest(model.get_parameter(name).detach().numpy())
        assert not np.array_equal(vectors[name].values(), rounded.values()), "the norm is not the changed one"
