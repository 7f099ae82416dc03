"""The repair of a weight: exact where it can be, as strong as held-out samples allow, defined where inputs are dead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from roundexport.algorithms.common import error_compensation
from roundexport.kernels import gram

WIDTH = 24


def inputs(tokens: int, seed: int, share: float) -> tuple[Tensor, Tensor]:
    """x̂ and x [tokens, WIDTH], where ``share`` of x - x̂ is linear in x̂ and the rest is noise of the same size."""
    draw = torch.Generator().manual_seed(seed)
    quantized, noise = torch.randn(2, tokens, WIDTH, generator=draw)
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) / WIDTH**0.5
    return quantized, quantized + 0.3 * (share * quantized @ mixing + (1 - share) * noise)


def sums(tokens: int, seed: int, share: float) -> tuple[Tensor, Tensor]:
    quantized, floats = inputs(tokens, seed, share)
    return gram.run(quantized, floats, torch.ones(tokens))


def test_two_samples_of_eight_are_held_out_however_they_are_batched() -> None:
    assert list(error_compensation.shares(0, 12)) == [(False, slice(0, 6)), (True, slice(6, 8)), (False, slice(8, 12))]
    assert list(error_compensation.shares(5, 2)) == [(False, slice(0, 1)), (True, slice(1, 2))]
    assert list(error_compensation.shares(7, 1)) == [(True, slice(0, 1))]


@pytest.mark.parametrize(("tokens", "share", "expected"), [(4000, 1.0, 0.001), (40, 0.0, 1.0)])
def test_much_where_there_is_little_to_learn_and_little_where_there_is_much(
    tokens: int, share: float, expected: float
) -> None:
    weight = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(9))
    assert error_compensation.choose(sums(tokens, 1, share), sums(tokens, 2, share), (weight, weight[:3])) == expected


def test_the_choice_is_the_least_squared_error_of_outputs() -> None:
    """The loss in sums is that of the tokens, less a constant."""
    weight = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(9))
    fitted, (quantized, floats) = sums(60, 1, 0.5), inputs(60, 2, 0.5)

    def error(damping: float) -> float:
        target = weight + error_compensation.solve(fitted[0], fitted[1] @ weight.t(), damping).t()
        return float((quantized @ target.t() - floats @ weight.t()).square().sum())

    chosen = error_compensation.choose(fitted, gram.run(quantized, floats, torch.ones(60)), (weight,))
    assert 0.001 < chosen < 1
    assert error(chosen) == min(error(damping) for damping in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0))


def test_inputs_that_are_always_zero_change_nothing() -> None:
    nothing = torch.zeros(WIDTH, WIDTH)
    assert torch.equal(error_compensation.solve(nothing, nothing, 0.1), nothing)


def test_sums_too_large_to_judge_end_in_much_damping() -> None:
    """float32 overflows at every rung: the walk ends, where least is trusted."""
    weight = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(9))
    fitted = sums(60, 1, 0.5)
    huge = tuple(part * 1e38 for part in sums(60, 2, 0.5))
    assert error_compensation.choose(fitted, huge, (1e4 * weight,)) == 1.0
