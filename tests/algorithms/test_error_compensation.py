"""The repair of a weight: exact where it can be, as strong as held-out samples allow, defined where inputs are dead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from roundexport.algorithms.common import error_compensation
from roundexport.algorithms.common.error_compensation import InputSums
from roundexport.algorithms.rounding._gram_problem import Problem
from roundexport.kernels import cholesky, gram

WIDTH = 24


def inputs(tokens: int, seed: int, share: float) -> tuple[Tensor, Tensor]:
    """x̂ and x [tokens, WIDTH], where ``share`` of x - x̂ is linear in x̂ and the rest is noise of the same size."""
    draw = torch.Generator().manual_seed(seed)
    quantized, noise = torch.randn(2, tokens, WIDTH, generator=draw)
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) / WIDTH**0.5
    return quantized, quantized + 0.3 * (share * quantized @ mixing + (1 - share) * noise)


def summed(quantized: Tensor, floats: Tensor, error: Tensor | None = None) -> InputSums:
    both = gram.run(quantized, floats, torch.ones(len(quantized)))
    return InputSums(*both, None if error is None else quantized.t() @ error)


def sums(tokens: int, seed: int, share: float) -> InputSums:
    return summed(*inputs(tokens, seed, share))


def chosen(fitted: InputSums, other: InputSums, *weights: Tensor) -> float:
    held_out = error_compensation.HeldOut.of(fitted, other, weights)
    return error_compensation.choose(lambda dampings: map(held_out.loss, dampings))


def repaired(fitted: InputSums, right: Tensor, damping: float) -> Tensor:
    return cholesky.solve(cholesky.run(error_compensation.damped(fitted.gram, damping)), right)


def test_two_samples_of_eight_are_held_out_however_they_are_batched() -> None:
    assert list(error_compensation.shares(0, 12)) == [(False, slice(0, 6)), (True, slice(6, 8)), (False, slice(8, 12))]
    assert list(error_compensation.shares(5, 2)) == [(False, slice(0, 1)), (True, slice(1, 2))]
    assert list(error_compensation.shares(7, 1)) == [(True, slice(0, 1))]


@pytest.mark.parametrize(("tokens", "share", "expected"), [(4000, 1.0, 0.001), (40, 0.0, 1.0)])
def test_much_where_there_is_little_to_learn_and_little_where_there_is_much(
    tokens: int, share: float, expected: float
) -> None:
    weight = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(9))
    assert chosen(sums(tokens, 1, share), sums(tokens, 2, share), weight, weight[:3]) == expected


@pytest.mark.parametrize("writes", [False, True])
def test_the_choice_is_the_least_squared_error_of_outputs(writes: bool) -> None:
    """The loss in sums is that of the tokens, less a constant; also of what the residual stream lacks there."""
    weight = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(9))
    (others, wanted), (quantized, floats) = inputs(60, 1, 0.5), inputs(60, 2, 0.5)
    mixing = torch.randn(WIDTH, 16, generator=torch.Generator().manual_seed(8))
    lacking = [(y + 2 * x).roll(1, 1) @ mixing if writes else None for x, y in ((others, wanted), (quantized, floats))]
    fitted = summed(others, wanted, lacking[0])

    def error(damping: float) -> float:
        right = fitted.cross @ weight.t() + (fitted.residual if fitted.residual is not None else 0)
        target = weight + repaired(fitted, right, damping).t()
        beside = 0 if lacking[1] is None else lacking[1]
        return float((quantized @ target.t() - floats @ weight.t() - beside).square().sum())

    best = chosen(fitted, summed(quantized, floats, lacking[1]), weight)
    assert 0.001 < best < 1
    assert error(best) == min(error(damping) for damping in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0))


def test_inputs_that_are_always_zero_change_nothing() -> None:
    nothing = torch.zeros(WIDTH, WIDTH)
    assert torch.equal(Problem.of([InputSums(nothing.clone(), nothing.clone())], (), 0.1).repair, nothing)


def test_sums_too_large_to_judge_end_in_much_damping() -> None:
    """float32 overflows at every rung: the walk ends, where least is trusted."""
    weight = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(9))
    fitted = sums(60, 1, 0.5)
    huge = InputSums(*(part * 1e38 for part in sums(60, 2, 0.5).tensors().values()))
    assert chosen(fitted, huge, 1e4 * weight) == 1.0


def test_a_problem_in_parts_is_the_whole_one() -> None:
    """Against plain solutions in float64; and columns in several parts, each with the corner that it needs."""
    width = 600
    draw = torch.Generator().manual_seed(4)
    tokens, others = torch.randn(2, 900, width, generator=draw)
    error = torch.randn(900, 8, generator=draw)
    given = [summed(x, x + 0.1 * y, error) for x, y in ((tokens, others), (others, tokens))]
    weight = torch.randn(8, width, generator=draw)
    both = [sum(part.tensors()[kind].double() for part in given) for kind in ("gram", "cross", "residual")]
    found = Problem.of([InputSums(*(t.clone() for t in part.tensors().values())) for part in given], [weight], 0.3)
    mean, usual = both[0].diagonal().mean(), both[0].diagonal().sqrt().mean() ** 2
    assert found.added == pytest.approx(0.3 * float(usual), rel=1e-5)
    torch.testing.assert_close(found.gram.double(), both[0] + found.added * torch.eye(width), rtol=1e-6, atol=1e-3)
    one = torch.eye(width, dtype=torch.float64)
    torch.testing.assert_close(
        found.factor.t().double() @ found.factor.double() @ found.gram.double(), one, rtol=0, atol=1e-4
    )
    damping = chosen(given[0], given[1], weight)
    expected = torch.linalg.solve(both[0] + damping * mean * one, torch.cat(both[1:], 1))
    assert found.shift is not None
    solved = torch.cat([found.repair, found.shift.t()], 1).double()
    torch.testing.assert_close(solved, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
