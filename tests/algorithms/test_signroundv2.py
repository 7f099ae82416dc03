"""SignRoundV2: what differs from SignRound, on a block small enough to follow."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from sign_toys import Block, inputs_of, loss_of, specs
from torch import Tensor

from roundexport.algorithms.interface import BlockInputs
from roundexport.algorithms.rounding import optimal_rtn, signround, signroundv2
from roundexport.errors import RoundexportError, UsageError
from roundexport.kernels import fake_quant, grid_search, searched_rounding, stored_scales
from roundexport.quant.spec import QuantSpec

SETTINGS = signroundv2.SignRoundV2Settings(steps=60, batch_size=4)
SCHEMES = list(itertools.product((2, 3, 4), (True, False)))


@pytest.fixture
def block() -> Block:
    return Block()


@pytest.fixture
def inputs(block: Block) -> BlockInputs:
    return inputs_of(block)


def rounding(spec: QuantSpec, seed: int = 0) -> signroundv2._Rounding:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 32, generator=generator)
    found = signroundv2._Rounding(weight, spec, torch.rand(32, generator=generator) + 0.1, "up")
    found.rounding_offset.uniform_(-0.4, 0.4, generator=generator)
    found.coefficient.uniform_(0.7, 1.3, generator=generator)
    return found


@pytest.mark.parametrize(("bits", "symmetric"), SCHEMES)
def test_it_starts_at_the_stretched_grid_and_learns(
    block: Block, inputs: BlockInputs, bits: int, symmetric: bool
) -> None:
    result = signroundv2.tune_block(block, inputs, specs(bits, symmetric), SETTINGS)
    moments = optimal_rtn.second_moments(block, inputs, ["up", "down"], inputs.float_inputs, 4)
    start = {}
    for name, spec in specs(bits, symmetric).items():
        weight = getattr(block, name).weight
        scale, zero = (t[..., None] for t in grid_search.search(weight, spec, moments[name]))
        grouped = fake_quant.Grouped.of(weight, spec)
        stretched = searched_rounding.stretched(grouped, scale, zero, moments[name])
        assert not torch.equal(stretched, scale)
        start[name] = (grid_search.nearest_centered_codes(grouped, stretched, zero) * stretched).flatten(1)
    error = (inputs.call.run(block, inputs.quantized_inputs, start) - inputs.target)[:, :-1].square().mean()
    assert result.loss_before == pytest.approx(float(error), rel=1e-5)
    assert result.loss_after == pytest.approx(loss_of(block, inputs, result.layers), rel=1e-5)
    assert result.loss_after < 0.85 * result.loss_before


@pytest.mark.parametrize("symmetric", [True, False])
def test_at_two_bits_it_ends_below_signround(block: Block, inputs: BlockInputs, symmetric: bool) -> None:
    found = signroundv2.tune_block(block, inputs, specs(2, symmetric), SETTINGS)
    plain = signround.tune_block(
        block, inputs, specs(2, symmetric), signround.SignRoundSettings(steps=60, batch_size=4)
    )
    assert found.loss_after < plain.loss_after


@pytest.mark.parametrize(("bits", "symmetric"), SCHEMES)
def test_slope_of_the_coefficient_is_that_of_finite_differences(bits: int, symmetric: bool) -> None:
    # Straight through: ŵ = (code - z)·s with s = s₀·c, in which the codes stand still but for w / s where M = 1.
    found = rounding(QuantSpec(bits, 16, symmetric, "float32"))
    found.weight()
    gradient = torch.randn(found.grouped.weight.shape, generator=torch.Generator().manual_seed(3))
    steps, start = found.fake.centered_codes, found.start.double()
    through = gradient * (steps == found.fake.unclamped)
    offset_gradient, coefficient_gradient = found._gradients(gradient)

    def value(shift: float) -> Tensor:
        scale = start * (found.coefficient.double() + shift)
        straight = through * (found.grouped.weight / scale)
        return (gradient * steps * scale + straight * found.fake.scale).sum(-1, keepdim=True)

    expected = (value(1e-5) - value(-1e-5)) / 2e-5
    torch.testing.assert_close(coefficient_gradient.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(offset_gradient, through * found.fake.scale)
    if bits == 2:
        assert bool((steps != found.fake.unclamped).any())


@pytest.mark.parametrize("dtype", ["float16", "float32", "exponent8"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_integers_are_those_of_the_last_forward(symmetric: bool, dtype: str) -> None:
    found = rounding(QuantSpec(3, 16, symmetric, dtype))
    weight = found.weight()
    assert torch.equal(torch.from_numpy(found.quantized().dequantize()), weight)
    assert torch.equal(stored_scales.stored(found.fake.scale, found.grouped.spec), found.fake.scale)
    state = found.state()
    found.step(torch.ones_like(weight), 0.3)
    assert not torch.equal(found.weight(), weight)
    found.restore(state)
    assert torch.equal(found.weight(), weight)


def test_the_coefficient_stays_between_nothing_and_twice() -> None:
    found = rounding(QuantSpec(2, 16))
    for _ in range(8):
        found.weight()
        found.step(torch.randn(6, 32, generator=torch.Generator().manual_seed(1)), 0.9)
    assert float(found.coefficient.min()) >= 0 and float(found.coefficient.max()) <= 2
    assert bool(torch.isfinite(found.weight()).all())


def test_zero_points_stay_as_they_were_found(block: Block, inputs: BlockInputs) -> None:
    result = signroundv2.tune_block(block, inputs, specs(2, False), SETTINGS)
    start = optimal_rtn.tune_block(block, inputs, specs(2, False), optimal_rtn.OptimalRtnSettings())
    for name, linear in result.layers.items():
        assert (linear.zero_points == start.layers[name].zero_points).all()
        assert not (linear.scales == start.layers[name].scales).all()


# --- the loss


def test_the_largest_thousandth_of_the_errors_does_not_count(block: Block, inputs: BlockInputs) -> None:
    # 10 samples of 7 positions that count and 32 channels: 2240 elements, of which 2 are left out.
    batch = torch.arange(10)
    spoiled = inputs.target.clone()
    spoiled[2, 3, 5], spoiled[7, 0, 1] = 1e4, -1e4
    spoiled[:, -1] = 1e6  # does not count, so does not use up what is left out
    inputs = dataclasses.replace(inputs, target=spoiled)
    weight = (block.up.weight * 1.01).requires_grad_()
    loss = signroundv2.filtered_error(block, inputs, {"up": weight}, batch)
    error = (inputs.call.run(block, inputs.quantized_inputs[batch], {"up": weight}) - spoiled[batch])[:, :-1]
    squares = error.detach().square().flatten().sort().values
    assert loss.item() == pytest.approx(float(squares[:-2].sum()) / 2240, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert float(gradient.abs().max()) < 1


@pytest.mark.parametrize(
    ("bits", "symmetric", "filtered"), [(2, True, True), (3, True, True), (4, True, False), (2, False, False)]
)
def test_which_schemes_filter(
    block: Block, inputs: BlockInputs, monkeypatch: pytest.MonkeyPatch, bits: int, symmetric: bool, filtered: bool
) -> None:
    seen: list[int] = []
    original = signroundv2.filtered_error

    def spy(*args: object) -> Tensor:
        seen.append(1)
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(signroundv2, "filtered_error", spy)
    signroundv2.tune_block(
        block, inputs, specs(bits, symmetric), signroundv2.SignRoundV2Settings(steps=2, batch_size=4)
    )
    assert len(seen) == (2 if filtered else 0)  # the points are compared by the plain error


# --- rules of the loop


@pytest.mark.parametrize(
    ("steps", "bits", "rate"), [(200, 2, 1 / 200), (1000, 4, 1 / 1000), (1000, 3, 2 / 1000), (2000, 2, 2 / 2000)]
)
def test_long_runs_at_few_bits_step_twice_as_far(steps: int, bits: int, rate: float) -> None:
    assert signroundv2.SignRoundV2Settings(steps).rate(QuantSpec(bits, 16)) == rate
    assert signroundv2.SignRoundV2Settings(steps, learning_rate=0.01).rate(QuantSpec(bits, 16)) == 0.01


def test_layers_of_one_block_step_at_their_own_rate(
    block: Block, inputs: BlockInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[int, float] = {}
    original = signroundv2._Rounding.step

    def spy(self: signroundv2._Rounding, gradient: Tensor, size: float) -> None:
        sizes.setdefault(self.grouped.spec.bits, size)
        original(self, gradient, size)

    monkeypatch.setattr(signroundv2._Rounding, "step", spy)
    monkeypatch.setattr(signroundv2.SignRoundV2Settings, "rate", lambda self, spec: spec.bits / 100)
    mixed = {"up": QuantSpec(2, 16), "down": QuantSpec(4, 16, False)}
    signroundv2.tune_block(block, inputs, mixed, signroundv2.SignRoundV2Settings(steps=3, batch_size=4))
    assert sizes == {2: 0.02, 4: 0.04}


def test_same_seed_same_integers(block: Block, inputs: BlockInputs) -> None:
    first, second = (signroundv2.tune_block(block, inputs, specs(2, True), SETTINGS) for _ in range(2))
    assert all(first.layers[name].equals(second.layers[name]) for name in first.layers)


def test_a_loss_that_is_no_number_is_an_error(block: Block, inputs: BlockInputs) -> None:
    broken = dataclasses.replace(inputs, target=inputs.target * float("nan"))
    with pytest.raises(RoundexportError, match="not a finite number"):
        signroundv2.tune_block(block, broken, specs(4, True), signroundv2.SignRoundV2Settings(steps=2, batch_size=4))


@pytest.mark.parametrize("word", ["steps", "batch_size", "learning_rate"])
def test_settings_without_sense_are_refused(word: str) -> None:
    with pytest.raises(UsageError, match=word):
        signroundv2.SignRoundV2Settings(**{word: 0})
