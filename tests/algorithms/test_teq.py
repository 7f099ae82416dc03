"""TEQ: trained factors beat rounding alone and leave the float block, or the whole model, what it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from roundexport.algorithms.common import scaling_training
from roundexport.algorithms.interface import BlockInputs
from roundexport.algorithms.rounding import rtn
from roundexport.algorithms.transforms import teq, teq_model
from roundexport.errors import RoundexportError, UsageError
from roundexport.kernels import fake_quant, round_to_nearest
from roundexport.model.block_call import capture_calls, first_hidden
from roundexport.model.blocks import Stack, find_stack, linears, weight_of
from roundexport.model.checkpoint import Checkpoint
from roundexport.quant.spec import QuantSpec

Models = Callable[[str], Path]
ROW3 = QuantSpec(3, None, symmetric=False)
QUICK = teq.TeqSettings(steps=12, batch_size=4)


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
    layers = rtn.tune_block(block, None, specs, rtn.RtnSettings()).layers
    weights = {name: torch.from_numpy(linear.dequantize()) for name, linear in layers.items()}
    return float((inputs.call.run(block, inputs.quantized_inputs, weights) - inputs.target)[:, :-1].square().mean())


@pytest.mark.parametrize(("family", "start"), [("llama", "ones"), ("gpt2", "grid")])
def test_rounding_costs_less_and_the_float_block_is_what_it_was(family: str, start: str, models: Models) -> None:
    model, stack, ids = loaded(models(family))
    block, inputs = stack.blocks[0], first_inputs(model, stack, ids)
    specs = dict.fromkeys(linears(block), ROW3)
    before, state = rounded_loss(block, inputs, specs), {n: t.clone() for n, t in block.state_dict().items()}
    changed = teq.transform_block(
        block, inputs, specs, dataclasses.replace(QUICK, start=start, learning_rate=0.05)
    ).changed
    assert rounded_loss(block, inputs, specs) < 0.8 * before
    torch.testing.assert_close(inputs.call.run(block, inputs.float_inputs), inputs.target, rtol=1e-4, atol=1e-4)
    moved = {name for name, tensor in block.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed.keys() == moved - {f"{name}.weight" for name in specs}
    assert all(torch.equal(changed[name], block.get_parameter(name)) for name in changed)


def test_weights_without_a_scheme_stay_float_and_are_handed_back(models: Models) -> None:
    model, stack, ids = loaded(models("llama"))
    block, inputs = stack.blocks[0], first_inputs(model, stack, ids)
    specs = dict.fromkeys(set(linears(block)) - {"mlp.gate_proj", "self_attn.v_proj"}, ROW3)
    changed = teq.transform_block(block, inputs, specs, QUICK).changed
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
    layers = rtn.tune_block(block, None, specs, rtn.RtnSettings()).layers
    weights = {name: torch.from_numpy(linear.dequantize()) for name, linear in layers.items()}
    reached = dataclasses.replace(inputs, target=inputs.call.run(block, inputs.quantized_inputs, weights))
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    found = teq.transform_block(block, reached, specs, QUICK)
    assert not found.changed and not found.row_factors
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
def test_trained_on_the_whole_model_its_loss_falls_and_its_logits_stay(loss: str, models: Models) -> None:
    model, stack, ids = loaded(models("llama"))
    ids = ids[:, :1]
    for _ in range(15):  # the model's likeliest text, which rounding makes less likely
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    specs = [dict.fromkeys(linears(block), ROW3) for block in stack.blocks]
    expected, before = model(input_ids=ids).logits, model_loss(model, stack, ids, loss)
    settings = teq_model.TeqModelSettings(steps=15, batch_size=4, learning_rate=0.05, loss=loss)
    factors, hidden = (
        teq_model.train_model(model, stack, ids, specs, settings, seed=1),
        first_hidden(model, stack, ids, 8),
    )
    assert factors.loss_after < factors.loss_before == pytest.approx(before, rel=1e-4)
    for index, (block, call) in enumerate(zip(stack.blocks, capture_calls(model, stack, ids), strict=True)):
        outputs = call.run(block, hidden)
        inputs = BlockInputs(call, hidden, hidden, outputs, torch.ones(ids.shape))
        changed = teq_model.fold_block(block, inputs, specs[index], factors.blocks[index]).changed
        assert changed and all(name.endswith("norm.weight") for name in changed)
        hidden = outputs
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
    assert model_loss(model, stack, ids, loss) < before


def model_loss(model: nn.Module, stack: Stack, ids: Tensor, kind: str) -> float:
    """Loss of the model with its blocks' weights rounded to nearest."""
    weights = {
        f"{stack.block_name(index)}.{name}.weight": torch.from_numpy(
            round_to_nearest.run(weight_of(module), ROW3).dequantize()
        )
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
    gradient = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    (found,) = torch.autograd.grad(scaling_training.FakeQuant.apply(weight, spec, True), weight, gradient)

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

    (expected,) = torch.autograd.grad(through(weight), weight, gradient)
    # The stored scale is rounded to float16, 2**-11 of it, and what it multiplies is up to 16 codes.
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    (plain,) = torch.autograd.grad(scaling_training.FakeQuant.apply(weight, spec, False), weight, gradient)
    assert torch.equal(plain, gradient) and not torch.allclose(found, gradient, atol=0.1)


def test_rounded_values_are_those_of_the_rounding_method() -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    expected = round_to_nearest.run(weight, QuantSpec(3, 32, False)).dequantize()
    np.testing.assert_array_equal(
        scaling_training.FakeQuant.apply(weight, QuantSpec(3, 32, False), True).numpy(), expected
    )
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
        method.METHOD.settings(**{name: value})
