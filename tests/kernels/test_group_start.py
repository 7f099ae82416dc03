"""The start by groups: its definition in float64, less loss than grids fixed beforehand, groups that are held."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from roundexport.kernels import gram_descent, gram_rounding, group_start
from roundexport.quant.spec import QuantSpec

SPECS = [
    (QuantSpec(2, 32, True), 0.95),
    (QuantSpec(3, 32, False), 0.97),
    (QuantSpec(4, 32, True), 0.97),
    (QuantSpec(4, 32, False, "exponent8"), 1.0),
    (QuantSpec(3, None, True), 1.0),
]


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """A target [N, K] and H of correlated inputs."""
    generator = torch.Generator().manual_seed(7)
    mix = torch.eye(96) + torch.randn(96, 96, generator=generator) / 5
    inputs = torch.randn(400, 96, generator=generator) @ mix
    return torch.randn(48, 96, generator=generator), inputs.t() @ inputs / 400


def loss(rounding: gram_descent.Rounding, target: torch.Tensor, gram: torch.Tensor) -> float:
    error = rounding.weight() - target
    return float(((error @ gram) * error).sum())


@pytest.mark.parametrize(("spec", "most"), SPECS, ids=[spec.describe() for spec, _ in SPECS])
def test_groups_are_rounded_by_their_schur_complements(spec: QuantSpec, most: float) -> None:
    target, gram = problem()
    found = group_start.run(target, spec, gram)
    codes, scale, zero = group_start.reference(target.numpy(), spec, gram.numpy())
    expected = (codes.reshape(*scale.shape, -1) * scale[..., None]).reshape(codes.shape)
    # float32 decides a tie otherwise now and then; what follows in that row may differ too.
    assert (np.abs(found.weight().numpy() - expected) < 1e-4).all(1).mean() > 0.9
    assert (found.zero_point.numpy() == zero).mean() > 0.97
    by_columns = gram_rounding.run(target, spec, gram, gram_rounding.Effort(0, 0, False))
    assert loss(found, target, gram) < most * loss(by_columns, target, gram)


def test_the_whole_rounding_loses_less_from_this_start() -> None:
    target, gram = problem()
    spec = QuantSpec(4, 32, True)
    by_groups, by_columns = (
        loss(gram_rounding.run(target, spec, gram, gram_rounding.Effort(6, 1, True, groups)), target, gram)
        for groups in (True, False)
    )
    assert by_groups < 0.99 * by_columns


def test_groups_that_are_held_stay_zero() -> None:
    target, gram = problem()
    spec = QuantSpec(2, 32, True)
    held = torch.zeros(48, 3, dtype=torch.bool)
    held[::2, 1] = True
    target.view(48, 3, 32)[held] = 0
    grouped = group_start.run(target, spec, gram, held=held).centered_codes.view(48, 3, 32)
    assert bool((grouped[held] == 0).all()) and bool((grouped[~held] != 0).any(-1).all())
