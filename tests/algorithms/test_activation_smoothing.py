"""Smoothing: inputs in eight bits lose less, the float block stays what it was, and tune carries the norms along."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import tuned
from roundexport.algorithms.interface import BlockInputs, BlockResult
from roundexport.algorithms.rounding import gram
from roundexport.algorithms.transforms import activation_smoothing
from roundexport.errors import RoundexportError, UsageError
from roundexport.formats.artifact import Artifact
from roundexport.model.block_call import capture_calls, first_hidden
from roundexport.model.blocks import find_stack, linears, weight_of
from roundexport.model.checkpoint import Checkpoint
from roundexport.model.hooks import hooks
from roundexport.quant.spec import QuantSpec
from roundexport.schemes.activation_loss import rounded

Models = Callable[[str], Path]
Settings = activation_smoothing.ActivationSmoothingSettings
SPEC = QuantSpec(4, 32)


def first_block(folder: Path) -> tuple[nn.Module, BlockInputs]:
    """A block with massive channels, as real ones have, in its norms, values and up projection; and what enters it."""
    model = Checkpoint.open(folder).load_model().requires_grad_(False)
    block, generator = find_stack(model).blocks[0], torch.Generator().manual_seed(5)
    for name, parameter in block.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.mul_(torch.randn(len(parameter), generator=generator).exp())
    for name, module in linears(block).items():
        if name.endswith(("v_proj", "up_proj")):
            weight = weight_of(module)
            weight.mul_(torch.randn(len(weight), 1, generator=generator).exp())
    ids = torch.randint(4, 380, (4, 16), generator=torch.Generator().manual_seed(0))
    call, hidden = capture_calls(model, find_stack(model), ids)[0], first_hidden(model, find_stack(model), ids, 4)
    return block, BlockInputs(call, hidden, hidden, call.run(block, hidden), torch.ones(ids.shape), seed=3)


def inputs_of(block: nn.Module, inputs: BlockInputs) -> dict[str, Tensor]:
    """What every linear reads, [tokens, K]."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args: found.update({name: args[0].flatten(0, -2)})

    with hooks([module.register_forward_pre_hook(keep(name)) for name, module in linears(block).items()]):
        inputs.call.run(block, inputs.float_inputs)
    return found


def loss_in_eight_bits(block: nn.Module, inputs: BlockInputs) -> float:
    """Squared error of the block's output, every linear's inputs rounded with one scale per token."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tokens = args[0].flatten(0, -2)
        return (rounded(tokens, tokens.shape[1]).view(args[0].shape),)

    with hooks([module.register_forward_pre_hook(hook) for module in linears(block).values()]):
        return float((inputs.call.run(block, inputs.float_inputs) - inputs.target).square().mean())


def smoothed(
    block: nn.Module, inputs: BlockInputs, specs: Mapping[str, QuantSpec] | None = None, **settings: float
) -> dict[str, Tensor]:
    specs = dict.fromkeys(linears(block), SPEC) if specs is None else specs
    return dict(activation_smoothing.transform_block(block, inputs, specs, Settings(**settings)).changed)


@pytest.mark.parametrize(("family", "share"), [("llama", 0.7), ("gpt2", 0.8), ("gemma3", 0.7)])
def test_eight_bit_inputs_lose_less_and_the_float_block_is_what_it_was(
    family: str, share: float, models: Models
) -> None:
    block, inputs = first_block(models(family))
    before, state = loss_in_eight_bits(block, inputs), {n: t.clone() for n, t in block.state_dict().items()}
    changed = smoothed(block, inputs)
    assert loss_in_eight_bits(block, inputs) < share * before
    torch.testing.assert_close(inputs.call.run(block, inputs.float_inputs), inputs.target, rtol=1e-5, atol=1e-5)
    moved = {name for name, tensor in block.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed and changed.keys() == moved - {f"{name}.weight" for name in linears(block)}
    assert all(torch.equal(changed[name], block.get_parameter(name)) for name in changed)


def test_channels_differ_by_the_rest_of_the_exponent_and_a_group_of_heads_shares_its_factor(models: Models) -> None:
    block, inputs = first_block(models("llama"))
    before = {name: values.abs().amax(0) for name, values in inputs_of(block, inputs).items()}
    smoothed(block, inputs, exponent=0.5)
    after = {name: values.abs().amax(0) for name, values in inputs_of(block, inputs).items()}
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj"):
        expected = before[name].log() / 2  # of m / sqrt(m), up to the geometric mean
        found = after[name].log()
        torch.testing.assert_close(found - found.mean(), expected - expected.mean(), rtol=1e-3, atol=1e-3)
    values, outputs = linears(block)["self_attn.v_proj"], linears(block)["self_attn.o_proj"]
    width = block.get_submodule("self_attn").head_dim  # type: ignore[union-attr]
    heads, groups = weight_of(outputs).shape[1] // width, len(weight_of(values)) // width
    assert heads > groups
    factors = (before["self_attn.o_proj"] / after["self_attn.o_proj"]).view(groups, heads // groups, width)
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors), rtol=1e-4, atol=0)
    largest = before["self_attn.o_proj"].view_as(factors).amax(1).log()
    expected = largest / 2 - (largest / 2).mean()
    torch.testing.assert_close(factors[:, 0].log(), expected, rtol=1e-3, atol=1e-3)


def test_an_exponent_of_zero_changes_nothing(models: Models) -> None:
    block, inputs = first_block(models("llama"))
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    assert smoothed(block, inputs, exponent=0.0) == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


def test_padding_does_not_count_and_silent_channels_stay_finite(models: Models) -> None:
    found = []
    for padding in (1.0, 100.0):
        block, inputs = first_block(models("llama"))
        block.get_submodule("input_layernorm").weight[7] = 0  # type: ignore[index,operator]
        mask, hidden = inputs.mask.clone(), inputs.float_inputs.clone()
        mask[:, -4:], hidden[:, -4:, ::3] = 0, hidden[:, -4:, ::3] * padding
        smoothed(block, dataclasses.replace(inputs, mask=mask, float_inputs=hidden))
        found.append({name: tensor.clone() for name, tensor in block.state_dict().items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert all(bool(tensor.isfinite().all()) for tensor in found[0].values())


def test_weights_without_a_scheme_stay_float_and_are_handed_back(models: Models) -> None:
    block, inputs = first_block(models("llama"))
    changed = smoothed(block, inputs, dict.fromkeys(set(linears(block)) - {"mlp.gate_proj"}, SPEC))
    assert {"mlp.gate_proj.weight", "post_attention_layernorm.weight", "input_layernorm.weight"} == changed.keys()


def test_activations_that_are_no_numbers_are_an_error(models: Models) -> None:
    block, inputs = first_block(models("llama"))
    broken = inputs.float_inputs.clone()
    broken[-1] *= float("nan")  # not in the sample that pairs are tried on
    with pytest.raises(RoundexportError, match="not finite numbers"):
        smoothed(block, dataclasses.replace(inputs, float_inputs=broken))


@pytest.mark.parametrize(("name", "value"), [("exponent", -0.1), ("exponent", 1.1), ("samples", 0), ("batch_size", 0)])
def test_settings_without_sense_are_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=name):
        Settings(**{name: value})


def test_an_artifact_carries_the_changed_norms_and_gram_still_computes_float_outputs_itself(
    models: Models, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_to_gram = []

    def tune_block(block: nn.Module, inputs: BlockInputs, *rest: Any) -> BlockResult:
        left_to_gram.append(not inputs.float_outputs_ready)
        return gram.tune_block(block, inputs, *rest)

    monkeypatch.setattr(gram, "METHOD", dataclasses.replace(gram.METHOD, tune_block=tune_block))
    folder = tuned(
        models("llama"), tmp_path / "out", algorithm="gram", transform="activation_smoothing", group_size=None,
        num_samples=4, sample_len=24, batch_size=2, embedding_bits=None, calibration=str(calibration_text),
        method_settings=("activation_smoothing.exponent=0.5",),
    )  # fmt: skip
    assert left_to_gram == [True, True]
    artifact, model = Artifact.open(folder), Checkpoint.open(models("llama")).load_model()
    assert artifact.manifest.algorithm["settings"]["transform"]["settings"]["exponent"] == 0.5
    overrides = artifact.overrides()
    assert len(overrides) == 4 and all(name.endswith("layernorm.weight") for name in overrides)
    for name, values in overrides.items():
        reader = "self_attn.q_proj" if name.endswith("input_layernorm.weight") else "mlp.gate_proj"
        linear = f"{name.rsplit('.', 2)[0]}.{reader}"
        alpha = model.get_parameter(name).detach() / torch.tensor(values)
        assert float(alpha.log().abs().max()) > 0.1
        expected = weight_of(model.get_submodule(linear)).detach() * alpha
        found = torch.from_numpy(artifact.linear(linear).dequantize())
        assert float((found - expected).square().mean()) < 0.02 * float(expected.square().mean())
