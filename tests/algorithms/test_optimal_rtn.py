"""Optimal RTN: what the inputs weigh, and what it gains."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from roundexport.algorithms.interface import BlockInputs
from roundexport.algorithms.rounding import optimal_rtn, rtn
from roundexport.errors import SpecError, UsageError
from roundexport.model.block_call import BlockCall
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec

SETTINGS = optimal_rtn.OptimalRtnSettings(batch_size=5)


class Block(nn.Module):
    """Two linears and one that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.idle = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 32)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.down(nn.functional.silu(self.up(input=hidden_states)))


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block().requires_grad_(False).eval()


@pytest.fixture
def inputs(block: Block) -> BlockInputs:
    generator = torch.Generator().manual_seed(1)
    floats = torch.randn(12, 8, 32, generator=generator) * torch.logspace(-1, 1, 32)
    floats[..., 7] = 0
    mask = torch.ones(12, 8)
    mask[:, -1] = 0
    mask[3] = 0
    return BlockInputs(BlockCall((), {}, False), floats * 2, floats, block(floats), mask)


def output_error(block: Block, inputs: BlockInputs, layers: dict) -> float:
    weights = {name: torch.from_numpy(linear.dequantize()) for name, linear in layers.items()}
    error = inputs.call.run(block, inputs.float_inputs, weights) - inputs.target
    return float((error.square().mean(-1) * inputs.mask).sum())


def test_moments_are_the_mean_squares_of_positions_that_count(block: Block, inputs: BlockInputs) -> None:
    found = optimal_rtn.second_moments(block, inputs, ["up", "down", "idle"], inputs.float_inputs, batch_size=5)
    counted = inputs.float_inputs[inputs.mask.bool()].double()
    expected = {"up": counted.square().mean(0)}
    expected["down"] = nn.functional.silu(block.up(counted.float())).double().square().mean(0)
    for name, value in expected.items():
        floored = value.clamp(min=1e-4 * float(value.mean()))
        torch.testing.assert_close(found[name].double(), floored, rtol=1e-5, atol=0)
    assert float(found["up"][7]) == pytest.approx(1e-4 * float(expected["up"].mean()))
    assert torch.equal(found["idle"], torch.ones(32))
    assert not block.up._forward_pre_hooks


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_output_error_is_below_that_of_rounding_to_nearest(
    block: Block, inputs: BlockInputs, bits: int, symmetric: bool
) -> None:
    specs = {name: QuantSpec(bits, 16, symmetric) for name in ("up", "down")}
    plain = output_error(block, inputs, rtn.tune_block(block, None, specs, rtn.RtnSettings()).layers)
    found = output_error(block, inputs, optimal_rtn.tune_block(block, inputs, specs, SETTINGS).layers)
    assert found < 0.85 * plain, found / plain


def test_every_weight_takes_the_nearest_code_of_its_grid(block: Block, inputs: BlockInputs) -> None:
    for symmetric in (True, False):
        spec = QuantSpec(3, 16, symmetric)
        settings = optimal_rtn.OptimalRtnSettings(keep_size=False)
        linear = optimal_rtn.tune_block(block, inputs, {"up": spec}, settings).layers["up"]
        weight = block.up.weight.numpy().reshape(64, 2, 16, 1)
        grid = (np.arange(8)[None, None] - linear.full_zero_points()[..., None]) * linear.scales[..., None]
        least = np.abs(grid.astype(np.float32)[:, :, None] - weight).min(-1)
        error = np.abs(linear.dequantize().reshape(64, 2, 16) - weight[..., 0])
        np.testing.assert_allclose(error, least, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_keep_their_size_along_themselves_and_their_codes(
    block: Block, inputs: BlockInputs, symmetric: bool
) -> None:
    spec = QuantSpec(2, 16, symmetric)
    least, kept = (
        optimal_rtn.tune_block(block, inputs, {"up": spec}, optimal_rtn.OptimalRtnSettings(keep_size=keep)).layers["up"]
        for keep in (False, True)
    )
    assert (kept.unpack() == least.unpack()).all() and (kept.full_zero_points() == least.full_zero_points()).all()
    h = optimal_rtn.second_moments(block, inputs, ["up"], inputs.float_inputs, 8)["up"].numpy().reshape(2, 16)
    weight = block.up.weight.numpy().reshape(64, 2, 16)

    def size(linear: QuantizedLinear) -> np.ndarray:
        along = (h * weight * linear.dequantize().reshape(64, 2, 16)).sum(-1)
        return along / (h * weight**2).sum(-1)

    assert np.median(size(least)) < 0.97
    np.testing.assert_allclose(size(kept), 1, rtol=1e-3)  # half a unit of float16's last place is 5e-4


def test_which_inputs_weigh_can_be_chosen_and_masked_ones_do_not(block: Block, inputs: BlockInputs) -> None:
    specs = {"up": QuantSpec(2, 16, False)}
    generator = torch.Generator().manual_seed(9)
    other = torch.randn(inputs.float_inputs.shape, generator=generator)
    inputs = dataclasses.replace(inputs, quantized_inputs=other)
    by_floats = optimal_rtn.tune_block(block, inputs, specs, SETTINGS).layers["up"]
    settings = optimal_rtn.OptimalRtnSettings(batch_size=5, quantized_inputs=True)
    by_quantized = optimal_rtn.tune_block(block, inputs, specs, settings).layers["up"]
    assert not by_floats.equals(by_quantized)
    assert by_quantized.equals(
        optimal_rtn.tune_block(block, dataclasses.replace(inputs, float_inputs=other), specs, SETTINGS).layers["up"]
    )
    spoiled = inputs.float_inputs.clone()
    spoiled[:, -1] = 1e4
    again = optimal_rtn.tune_block(block, dataclasses.replace(inputs, float_inputs=spoiled), specs, SETTINGS).layers[
        "up"
    ]
    assert again.equals(by_floats)


def test_float_outputs_come_from_the_forward_that_measures(block: Block, inputs: BlockInputs) -> None:
    specs = {name: QuantSpec(2, 16, False) for name in ("up", "down")}
    expected = optimal_rtn.tune_block(block, inputs, specs, SETTINGS).layers
    for quantized in (False, True):
        forwards: list[int] = []
        hook = block.register_forward_hook(lambda *_, seen=forwards: seen.append(1))
        left = dataclasses.replace(inputs, target=torch.zeros_like(inputs.target), float_outputs_ready=False)
        settings = dataclasses.replace(SETTINGS, quantized_inputs=quantized)
        found = optimal_rtn.tune_block(block, left, specs, settings).layers
        hook.remove()
        torch.testing.assert_close(left.target, inputs.target)
        assert len(forwards) == (6 if quantized else 3)  # batches of 5 of 12 samples, once or twice
        assert quantized or all(found[name].equals(expected[name]) for name in specs)
    either = (dataclasses.replace(SETTINGS, quantized_inputs=quantized) for quantized in (False, True))
    assert [optimal_rtn.METHOD.reads_quantized(settings) for settings in either] == [False, True]


def test_block_is_left_alone_and_progress_reported(block: Block, inputs: BlockInputs) -> None:
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    shares: list[float] = []
    specs = {name: QuantSpec(4, 16) for name in ("up", "down")}
    optimal_rtn.tune_block(block, dataclasses.replace(inputs, report=shares.append), specs, SETTINGS)
    assert shares == [0.5, 1.0]
    assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())


def test_inputs_that_are_no_numbers_are_refused(block: Block, inputs: BlockInputs) -> None:
    broken = dataclasses.replace(inputs, float_inputs=inputs.float_inputs * float("nan"))
    with pytest.raises(SpecError, match="importance must be finite"):
        optimal_rtn.tune_block(block, broken, {"up": QuantSpec(4, 16)}, SETTINGS)


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(UsageError, match="batch_size"):
        optimal_rtn.OptimalRtnSettings(batch_size=0)


def test_transposed_weights_of_gpt2_go_through(inputs: BlockInputs) -> None:
    torch.manual_seed(4)
    straight, transposed = nn.Sequential(nn.Linear(32, 64)), nn.Sequential(Conv1D(64, 32))
    transposed[0].weight.data.copy_(straight[0].weight.t())
    spec = QuantSpec(3, 16, False)
    first, second = (
        optimal_rtn.tune_block(block, inputs, {"0": spec}, SETTINGS).layers["0"] for block in (straight, transposed)
    )
    assert first.equals(second)
