"""Transformations in a tuning run: what they change reaches artifact and graphs, and survives an interruption."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import tuned
from roundexport.algorithms.rounding import rtn
from roundexport.algorithms.transforms import teq, teq_model
from roundexport.calibration.samples import load_calibration
from roundexport.errors import Interrupted, UnsupportedError, UsageError, WontFitError
from roundexport.formats.artifact import Artifact
from roundexport.formats.artifact_writer import ArtifactWriter
from roundexport.kernels import round_to_nearest
from roundexport.model.artifact_source import artifact_source
from roundexport.model.block_call import capture_calls, first_hidden
from roundexport.model.blocks import find_stack, linears, weight_of
from roundexport.model.channel_scaling import find_pairs, fold
from roundexport.model.checkpoint import Checkpoint
from roundexport.quant.int8_tensor import Int8Tensor
from roundexport.quant.spec import LinearInfo, QuantSpec

Models = Callable[[str], Path]


class Transformed:
    """A model folded with random factors, some of it rounded, as an artifact with overrides and as torch's model."""

    def __init__(self, folder: Path, out: Path, keep_float: str) -> None:
        checkpoint = Checkpoint.open(folder)
        self.ids = torch.randint(4, 380, (2, 16), generator=torch.Generator().manual_seed(0))
        self.model = checkpoint.load_model().requires_grad_(False)
        self.plain = self.model(input_ids=self.ids).logits.numpy()
        stack = find_stack(self.model)
        calls, hidden = capture_calls(self.model, stack, self.ids), first_hidden(self.model, stack, self.ids, 2)
        layers, rounded, changed = [], {}, set()
        for index, (block, call) in enumerate(zip(stack.blocks, calls, strict=True)):
            pairs, prefix = find_pairs(block, call, hidden), f"{stack.block_name(index)}."
            generator = torch.Generator().manual_seed(index)
            alphas = [torch.randn(pair.width, generator=generator).mul(0.5).exp() for pair in pairs]
            changed |= {prefix + name for name in fold(block, pairs, alphas).names}
            for name, module in linears(block).items():
                if keep_float not in name:
                    rounded[prefix + name] = round_to_nearest.run(weight_of(module), QuantSpec(8, 32))
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
def test_folded_norms_biases_and_float_weights_reach_the_graph(
    target: str, family: str, models: Models, tmp_path: Path
) -> None:
    keep_float, names = FOLDED[family]
    made = Transformed(models(f"{family}, one block"), tmp_path / "artifact", keep_float)
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

        onnx.export(made.artifact, made.checkpoint, out, onnx.OnnxSettings())
        return onnx_support.Decoder(onnx_support.session(out, 0), len(mask)).run(made.ids.numpy(), mask)
    tools = pytest.importorskip("openvino_tools")
    import openvino as ov

    from roundexport.targets import openvino

    openvino.export(made.artifact, made.checkpoint, out, openvino.OpenVinoSettings())
    compiled = ov.Core().compile_model(out / "openvino_model.xml", "CPU", tools.EXACT)
    positions = np.arange(mask.shape[1])[None].repeat(len(mask), 0)
    feed = {"input_ids": made.ids.numpy(), "attention_mask": mask, "position_ids": positions}
    return tools.run_steps(compiled, feed, [])


@pytest.mark.parametrize(
    "rounding",
    [
        {"algorithm": "signround", "steps": 4},
        {"algorithm": "signroundv2", "steps": 4},
        {"algorithm": "gram"},
        {"algorithm": "bct", "everything": True, "steps": 4},
        {"algorithm": "optimal_rtn"},
        {"algorithm": "gram", "finish": "end_to_end", "steps": 4},
    ],
    ids=lambda rounding: rounding.get("finish") or rounding["algorithm"],
)
def test_factors_compose_with_every_rounding(
    rounding: dict[str, Any], models: Models, calibration_text: Path, tmp_path: Path
) -> None:
    asked = {"bits": 4, "group_size": None, "num_samples": 4, "sample_len": 16, "batch_size": 2, "steps": 4}
    asked |= {"calibration": str(calibration_text), "transform": "teq", **rounding}
    artifact = Artifact.open(tuned(models("llama, one block"), tmp_path / "out", **asked))
    assert artifact.manifest.algorithm["settings"]["transform"]["name"] == "teq"
    assert artifact.overrides()
    model, float_model = (
        Checkpoint.open(models("llama, one block")).load_model().requires_grad_(False) for _ in range(2)
    )
    for name in artifact.names():
        weight_of(model.get_submodule(name)).copy_(torch.from_numpy(artifact.linear(name).dequantize()))
    for name, values in artifact.overrides().items():
        model.get_parameter(name).copy_(torch.tensor(values))
    ids = torch.randint(4, 384, (2, 16), generator=torch.Generator().manual_seed(0))
    p, q = (torch.log_softmax(m(input_ids=ids).logits, -1) for m in (float_model, model))
    assert 0 < float((p.exp() * (p - q)).sum(-1).mean()) < 0.1  # norms that miss their factors lose far more


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
        expected = round_to_nearest.run(
            weight_of(model.get_submodule(linear)) * alpha, QuantSpec(3, None, symmetric=False)
        ).dequantize()
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

    monkeypatch.setattr(teq, "METHOD", dataclasses.replace(teq.METHOD, transform_block=stopping))
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
    with pytest.raises(
        UsageError, match="'rtn' is a rounding method, not a transform; known: activation_smoothing, teq"
    ):
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

    monkeypatch.setattr(rtn, "METHOD", dataclasses.replace(rtn.METHOD, tune_block=stopping))


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

    monkeypatch.setattr(teq_model, "METHOD", dataclasses.replace(teq_model.METHOD, train_model=counting))
    plain = Artifact.open(tuned(models("llama"), tmp_path / "plain", **{**WHOLE, "transform": "none", "steps": None}))
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
    with pytest.raises(WontFitError, match="teq_model, which trains the whole model in memory, takes about"):
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
        rounded = Int8Tensor.nearest(model.get_parameter(name).detach().numpy())
        assert not np.array_equal(vectors[name].values(), rounded.values()), "the norm is not the changed one"
