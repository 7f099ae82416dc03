"""Two-sided rounding: its definition in float64, less of the loss it is for, and what it falls back to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from roundexport.kernels import gram_descent, gram_rounding, two_sided
from roundexport.kernels.gram_rounding import Effort
from roundexport.quant.spec import QuantSpec

SPECS = [QuantSpec(2, 32, True), QuantSpec(3, 32, False), QuantSpec(4, None, True)]
NOTHING, USUAL = Effort(0, 0, False), Effort(6, 1, False)


def correlated(size: int, seed: int) -> torch.Tensor:
    """Sums of squares of values that are not independent, [size, size]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(size) + torch.randn(size, size, generator=generator) / 5
    values = torch.randn(400, size, generator=generator) @ mix
    return values.t() @ values / 400


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A target [N, K], H of its inputs and S of its outputs."""
    fisher = two_sided.damped(correlated(40, 5), 0.1)
    assert fisher is not None
    return torch.randn(40, 96, generator=torch.Generator().manual_seed(7)), correlated(96, 6), fisher


def loss(rounding: gram_descent.Rounding, target: torch.Tensor, gram: torch.Tensor, fisher: torch.Tensor) -> float:
    error = rounding.weight() - target
    return float(((fisher @ error) * (error @ gram)).sum())


@pytest.mark.parametrize("spec", SPECS, ids=[spec.describe() for spec in SPECS])
def test_rows_are_rounded_by_their_definition(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_sided, "_AGAIN", 0)
    monkeypatch.setattr(gram_rounding.stored_scales, "stored", lambda scale, _: scale)  # the reference stores none
    target, gram, fisher = problem()
    found = two_sided.run(target, spec, gram, fisher, NOTHING)
    codes, scale, zero = two_sided.reference(target.numpy(), spec, gram.numpy(), fisher.numpy())
    expected = (codes.reshape(*scale.shape, -1) * scale[..., None]).reshape(codes.shape)
    # float32 decides a tie otherwise now and then; what follows that row may differ too.
    assert (np.abs(found.weight().numpy() - expected) < 1e-4).all(1).mean() > 0.8
    assert (found.zero_point.numpy() == zero).mean() > 0.95


@pytest.mark.parametrize("spec", SPECS, ids=[spec.describe() for spec in SPECS])
def test_outputs_that_count_together_make_good_for_each_other(spec: QuantSpec) -> None:
    target, gram, fisher = problem()
    alone = gram_rounding.run(target, spec, gram, USUAL)
    together = two_sided.run(target, spec, gram, fisher, USUAL)
    assert loss(together, target, gram, fisher) < 0.85 * loss(alone, target, gram, fisher)
    assert loss(together, target, gram, torch.eye(40)) > loss(
        alone, target, gram, torch.eye(40)
    )  # and that is its price


def test_a_second_pass_takes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    target, gram, fisher = problem()
    again = two_sided.run(target, SPECS[0], gram, fisher, USUAL)
    monkeypatch.setattr(two_sided, "_AGAIN", 0)
    once = two_sided.run(target, SPECS[0], gram, fisher, USUAL)
    assert torch.equal(again.scale, once.scale)
    assert loss(again, target, gram, fisher) < 0.99 * loss(once, target, gram, fisher)


def test_outputs_that_count_alone_are_rounded_alone() -> None:
    target, gram, _ = problem()
    alone = gram_rounding.run(target, SPECS[0], gram, USUAL)
    found = two_sided.run(target, SPECS[0], gram, torch.eye(40), USUAL)
    assert (found.centered_codes == alone.centered_codes).float().mean() > 0.98  # descents end a few moves apart
    assert loss(found, target, gram, torch.eye(40)) <= 1.001 * loss(alone, target, gram, torch.eye(40))


def test_groups_that_are_held_stay_zero() -> None:
    target, gram, fisher = problem()
    held = torch.zeros(40, 3, dtype=torch.bool)
    held[::4, 1] = True
    target.view(40, 3, 32)[held] = 0
    found = two_sided.run(target, SPECS[0], gram, fisher, USUAL, held=held)
    assert not found.weight().view(40, 3, 32)[held].any()
    assert found.weight().view(40, 3, 32)[~held].any(-1).all()


def test_damping_is_a_share_of_the_mean() -> None:
    damped = two_sided.damped(torch.diag(torch.tensor([1.0, 3.0])) * 1e-12, 0.5)
    assert damped is not None and torch.allclose(damped, torch.diag(torch.tensor([1.0, 2.0])))
    assert two_sided.damped(torch.zeros(3, 3), 0.5) is None  # no output counts: rows have nothing to make good
