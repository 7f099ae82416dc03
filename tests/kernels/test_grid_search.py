"""Grid search: never worse than rounding to nearest, close to trying everything, the same choice by every means."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from roundexport.errors import SpecError
from roundexport.kernels import fake_quant, grid_search, stored_scales
from roundexport.quant.spec import QuantSpec

SPECS = [
    QuantSpec(bits, group, symmetric)
    for bits, group, symmetric in itertools.product((2, 3, 4, 8), (16, None), (True, False))
] + [QuantSpec(bits, 16, symmetric, "exponent8") for bits, symmetric in ((2, True), (3, False), (4, True), (8, False))]
describe = QuantSpec.describe
needs_numba = pytest.mark.skipif(grid_search.available() is not None, reason=str(grid_search.available()))


def sample(rows: int = 12, width: int = 48, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Groups of every kind: ordinary, one-sided, dead, equal, with an outlier, small; and inputs of every size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator) * 0.1
    weight[1], weight[2], weight[3], weight[4] = weight[1].abs(), -weight[2].abs(), 0, 0.25
    weight[5, 5], weight[6] = 9.5, weight[6] * 1e-4
    return weight, torch.rand(width, generator=generator) ** 4 + 1e-3


def losses(weight: Tensor, spec: QuantSpec, importance: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Weighted squared error of each group's nearest codes, float64 [N, G]."""
    grouped = fake_quant.Grouped.of(weight, spec)
    scale, zero = scale[..., None], zero[..., None]
    steps = grid_search.nearest_centered_codes(grouped, scale, zero)
    h = importance.double().expand_as(weight).reshape(grouped.weight.shape)
    return (h * (steps.double() * scale - grouped.weight).square()).sum(-1)


def nearest(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    grouped = fake_quant.Grouped.of(weight, spec)
    ones = torch.ones_like(grouped.least)
    fake = fake_quant.run(grouped, torch.zeros_like(grouped.weight), ones, ones)
    return fake.scale[..., 0], fake.zero_point[..., 0]


def check_grid(weight: Tensor, spec: QuantSpec, importance: Tensor) -> None:
    scale, zero = grid_search.search(weight, spec, importance)
    assert scale.dtype == zero.dtype == torch.float32 and scale.shape == zero.shape
    assert torch.equal(stored_scales.stored(scale, spec), scale)
    assert torch.equal(zero, zero.round()) and 0 <= float(zero.min()) and float(zero.max()) <= spec.max_code
    if spec.symmetric:
        assert (zero == spec.midpoint).all()
    found, plain = (losses(weight, spec, importance, *grid) for grid in ((scale, zero), nearest(weight, spec)))
    # The found grid is kept where its loss, added in float32, is below by 1e-5: what the float64 sums here may differ.
    assert (found <= plain * (1 + 1e-6) + 1e-30).all(), float((found - plain).max())


@pytest.mark.parametrize("spec", SPECS, ids=describe)
def test_no_group_loses_more_than_by_rounding_to_nearest(spec: QuantSpec) -> None:
    weight, importance = sample()
    check_grid(weight, spec, importance)
    check_grid(weight, spec, torch.where(torch.arange(48) < 20, 0.0, importance))  # a group that nothing reaches


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=32, max_size=32),
    weights=st.lists(st.floats(0, 1e6, width=32), min_size=32, max_size=32),
    spec=st.sampled_from([spec for spec in SPECS if spec.bits < 8]),
)
def test_no_group_loses_more_whatever_the_numbers(values: list[float], weights: list[float], spec: QuantSpec) -> None:
    check_grid(torch.tensor([values]), spec, torch.tensor(weights))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_grid_of_a_dense_search_is_noticeably_better(bits: int, symmetric: bool) -> None:
    spec = QuantSpec(bits, 32, symmetric)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(24, 32, generator=generator)
    importance = torch.rand(32, generator=generator) ** 3 + 0.01
    found = losses(weight, spec, importance, *grid_search.search(weight, spec, importance))[:, 0]
    best = torch.full_like(found, float("inf"))
    largest = weight.abs().amax(1, keepdim=True)
    zeros = [spec.midpoint] if symmetric else range(spec.max_code + 1)
    for share, zero, sign in itertools.product(np.geomspace(0.2, 1.6, 100), zeros, (1, -1) if symmetric else (1,)):
        scale = stored_scales.stored(sign * largest * float(share) / 2 ** (bits - 1), spec)
        best = torch.minimum(best, losses(weight, spec, importance, scale, torch.full_like(scale, zero))[:, 0])
    assert float((found / best).max()) < 1.03, (found / best).max()
    assert float(found.sum() / best.sum()) < 1.002, found.sum() / best.sum()
    plain = losses(weight, spec, importance, *nearest(weight, spec))
    assert float(found.sum()) < 0.85 * float(plain.sum())


@needs_numba
@pytest.mark.parametrize("spec", SPECS, ids=describe)
def test_compiled_torch_and_numpy_take_the_same_choice(spec: QuantSpec) -> None:
    weight, shared = sample()
    own = shared * torch.rand(weight.shape, generator=torch.Generator().manual_seed(1))
    for importance in (shared, own):
        expected = grid_search.reference(weight.numpy(), spec, importance.numpy())
        for search in (grid_search.run, grid_search.on_device):
            found = search(weight, spec, importance)
            assert all(np.array_equal(a.numpy(), b) for a, b in zip(found, expected, strict=True)), search


@needs_numba
def test_threads_and_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = sample(50)
    spec = QuantSpec(3, 16, False)
    expected = grid_search.run(weight, spec, importance)
    monkeypatch.setattr(grid_search, "_CHUNK", 64 * 3 * 7)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    found = grid_search.run(weight, spec, importance)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_importance_counts_by_its_ratios_and_by_channel() -> None:
    weight, importance = sample()
    spec = QuantSpec(3, 16, False)
    expected = grid_search.search(weight, spec, importance)
    for factor in (2.0**-100, 2.0**60):  # exact, so that the choice must be the same
        assert all(
            torch.equal(*pair)
            for pair in zip(grid_search.search(weight, spec, importance * factor), expected, strict=True)
        )
    spread = grid_search.search(weight, spec, importance.expand_as(weight))
    assert all(torch.equal(*pair) for pair in zip(spread, expected, strict=True))
    even = grid_search.search(weight, spec, torch.ones(48))
    assert losses(weight, spec, importance, *expected).sum() < losses(weight, spec, importance, *even).sum()


def test_without_numba_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = sample()
    spec = QuantSpec(4, 16)
    expected = grid_search.search(weight, spec, importance)
    monkeypatch.setattr(grid_search, "available", lambda: "numba not installed")
    monkeypatch.setattr(grid_search, "run", None)
    assert all(torch.equal(*pair) for pair in zip(grid_search.search(weight, spec, importance), expected, strict=True))


def test_both_signs_of_the_scale_are_found() -> None:
    weight = torch.linspace(-1, 1, 16)[None] * torch.tensor([[1.0], [1.0]])
    weight[0, 0], weight[1, -1] = -1.3, 1.3  # the far side gets the extra step: code 0
    scale, _ = grid_search.search(weight, QuantSpec(2, 16), torch.ones(16))
    assert float(scale[0]) > 0 > float(scale[1])


@pytest.mark.parametrize(
    ("weight", "importance", "word"),
    [
        (torch.ones(2, 32), torch.ones(31), r"importance \[31\]"),
        (torch.ones(2, 32), torch.full((32,), -1.0), "not negative"),
        (torch.ones(2, 32), torch.full((32,), float("nan")), "finite"),
        (torch.full((2, 32), float("nan")), torch.ones(32), "weight"),
        (torch.ones(2, 40), torch.ones(40), "does not divide K=40"),
    ],
)
def test_numbers_without_sense_are_refused(weight: Tensor, importance: Tensor, word: str) -> None:
    with pytest.raises(SpecError, match=word):
        grid_search.search(weight, QuantSpec(4, 16), importance)


# --- stored scales


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_stored_scale_is_what_numpy_rounds_to(dtype: str) -> None:
    spec = QuantSpec(4, 16, scale_dtype=dtype)
    values = torch.tensor([0.0, 1e-9, -1e-9, 0.1, -0.1, 3e38, -1e6, 1e-5, 2.0**-14])
    found = stored_scales.stored(values, spec)
    assert np.array_equal(found.numpy(), stored_scales.reference(values.numpy(), spec))
    assert np.array_equal(found.numpy(), found.numpy().astype(dtype).astype(np.float32))
    least = fake_quant.SMALLEST_SCALE[dtype]
    assert float(found.abs().min()) == np.float32(least) and bool((found[1:].sign() == values[1:].sign()).all())
    assert float(found[3]) == np.float32(np.dtype(dtype).type(0.1))


def test_power_of_two_scales_are_the_nearest_in_ratio() -> None:
    spec = QuantSpec(4, 16, scale_dtype="exponent8")
    values = torch.exp2(torch.empty(4000).uniform_(-24, 15, generator=torch.Generator().manual_seed(0)))
    values[::2] *= -1
    found = stored_scales.stored(values, spec)
    assert np.array_equal(found.numpy(), stored_scales.reference(values.numpy(), spec))
    assert (found.frexp().mantissa.abs() == 0.5).all() and (found.sign() == values.sign()).all()
    assert float((found / values).double().log2().abs().max()) <= 0.5 + 1e-6
    # Beyond what float16 holds the nearest that it does hold, not infinity.
    assert stored_scales.stored(torch.tensor([0.0, -1e-30, 1e30]), spec).tolist() == [2.0**-24, -(2.0**-24), 2.0**15]
