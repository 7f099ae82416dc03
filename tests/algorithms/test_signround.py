"""SignRound: the rules of its loop, on a block small enough to follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from sign_toys import Block, inputs_of, loss_of, specs

from roundexport.algorithms.common.batches import shuffled_batches
from roundexport.algorithms.interface import BlockInputs
from roundexport.algorithms.rounding import rtn, signround
from roundexport.errors import RoundexportError, UsageError

SETTINGS = signround.SignRoundSettings(steps=60, batch_size=4)


@pytest.fixture
def block() -> Block:
    return Block()


@pytest.fixture
def inputs(block: Block) -> BlockInputs:
    return inputs_of(block)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_learned_rounding_beats_nearest(block: Block, inputs: BlockInputs, bits: int, symmetric: bool) -> None:
    result = signround.tune_block(block, inputs, specs(bits, symmetric), SETTINGS)
    nearest = rtn.tune_block(block, inputs, specs(bits, symmetric), rtn.RtnSettings())
    # The 32 samples compared are all 12 here, so the reported losses are those of the integers handed back.
    assert result.loss_before == pytest.approx(loss_of(block, inputs, nearest.layers), rel=1e-5)
    assert result.loss_after == pytest.approx(loss_of(block, inputs, result.layers), rel=1e-5)
    assert result.loss_after < 0.8 * result.loss_before


def test_same_seed_same_integers_and_another_seed_others(block: Block, inputs: BlockInputs) -> None:
    first, second = (signround.tune_block(block, inputs, specs(3, True), SETTINGS) for _ in range(2))
    assert all(first.layers[name].equals(second.layers[name]) for name in first.layers)
    other = signround.tune_block(block, dataclasses.replace(inputs, seed=4), specs(3, True), SETTINGS)
    assert not other.layers["up"].equals(first.layers["up"])


def test_the_global_random_state_is_left_alone(block: Block, inputs: BlockInputs) -> None:
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    signround.tune_block(block, inputs, specs(4, True), signround.SignRoundSettings(steps=3, batch_size=4))
    assert torch.equal(torch.rand(1), expected)


def test_masked_positions_do_not_count(block: Block, inputs: BlockInputs) -> None:
    spoiled = inputs.target.clone()
    spoiled[:, -1] = 1e6
    clean = signround.tune_block(block, inputs, specs(4, True), SETTINGS)
    found = signround.tune_block(block, dataclasses.replace(inputs, target=spoiled), specs(4, True), SETTINGS)
    assert all(found.layers[name].equals(clean.layers[name]) for name in clean.layers)


def test_block_is_left_as_it_was(block: Block, inputs: BlockInputs) -> None:
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    signround.tune_block(block, inputs, specs(4, False), SETTINGS)
    assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())


def test_offset_and_clips_stay_within_what_the_steps_allow(
    block: Block, inputs: BlockInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[signround._Rounding] = []
    original = signround._Rounding.__init__

    def spy(self: signround._Rounding, *args: object) -> None:
        original(self, *args)
        seen.append(self)

    monkeypatch.setattr(signround._Rounding, "__init__", spy)
    signround.tune_block(block, inputs, specs(2, False), SETTINGS)
    # Σ lr·(1 - i/steps) over i = (steps + 1)/2 · lr with lr = 1/steps: 0.5083 at 60 steps.
    bound = (SETTINGS.steps + 1) / 2 / SETTINGS.steps + 1e-5
    for rounding in seen:
        assert float(rounding.rounding_offset.abs().max()) <= bound
        assert 1 - bound <= float(rounding.min_scale.min()) and float(rounding.min_scale.max()) <= 1
        assert 1 - bound <= float(rounding.max_scale.min()) and float(rounding.max_scale.max()) <= 1


def test_batches_are_a_shuffled_cycle_that_drops_its_tail() -> None:
    batches = shuffled_batches(10, 4, seed=5)
    first, second, third, fourth = (next(batches).tolist() for _ in range(4))
    assert len({*first, *second}) == 8 and len({*third, *fourth}) == 8
    assert first + second != third + fourth
    assert len(next(shuffled_batches(3, 8, seed=5))) == 3


def test_every_step_is_reported(block: Block, inputs: BlockInputs) -> None:
    shares: list[float] = []
    settings = signround.SignRoundSettings(steps=4, batch_size=4)
    signround.tune_block(block, dataclasses.replace(inputs, report=shares.append), specs(4, True), settings)
    assert shares == [0.25, 0.5, 0.75, 1.0]


def test_the_start_is_kept_where_every_step_makes_it_worse(block: Block, inputs: BlockInputs) -> None:
    # The target is what nearest rounding gives: its loss is 0, and any code that moves makes it larger.
    nearest = rtn.tune_block(block, inputs, specs(4, True), rtn.RtnSettings()).layers
    weights = {name: torch.from_numpy(linear.dequantize()) for name, linear in nearest.items()}
    reached = dataclasses.replace(inputs, target=inputs.call.run(block, inputs.quantized_inputs, weights))
    noisy = dataclasses.replace(reached, mask=torch.ones_like(inputs.mask))
    result = signround.tune_block(block, noisy, specs(4, True), SETTINGS)
    assert result.loss_before == result.loss_after == 0
    assert all(result.layers[name].equals(nearest[name]) for name in nearest)


def test_a_loss_that_is_no_number_is_an_error(block: Block, inputs: BlockInputs) -> None:
    broken = dataclasses.replace(inputs, target=inputs.target * float("nan"))
    with pytest.raises(RoundexportError, match="not a finite number"):
        signround.tune_block(block, broken, specs(4, True), signround.SignRoundSettings(steps=2, batch_size=4))


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: signround.SignRoundSettings(steps=0), "steps"),
    (lambda: signround.SignRoundSettings(batch_size=0), "batch_size"),
    (lambda: signround.SignRoundSettings(learning_rate=0.0), "learning_rate"),
]


@pytest.mark.parametrize(("make", "word"), BAD)
def test_settings_without_sense_are_refused(make: Callable[[], object], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        make()
