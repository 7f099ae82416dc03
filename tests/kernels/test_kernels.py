"""Kernels against their definitions: the group-quantized product, and fake quantization with its gradients."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from roundexport.errors import SpecError
from roundexport.kernels import fake_quant, group_matmul
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec

SPECS = [
    QuantSpec(bits, group, symmetric)
    for bits, group, symmetric in itertools.product((2, 3, 4, 8), (32, None), (True, False))
]
POWERS = [replace(spec, scale_dtype="exponent8") for spec in SPECS]
describe = QuantSpec.describe


def weight(rows: int = 12, width: int = 96, seed: int = 0) -> np.ndarray:
    """Groups of every kind: ordinary, one-sided, dead, with an outlier, and subnormally small."""
    values = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32) * np.float32(0.1)
    values[1] = np.abs(values[1])
    values[2] = -np.abs(values[2])
    values[3] = 0
    values[4, 5] = 9.5
    values[5] *= np.float32(1e-7)
    return values


def learned(spec: QuantSpec, values: np.ndarray, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    grid = (len(values), spec.groups(values.shape[1]))
    offset = random.uniform(-0.5, 0.5, values.shape).astype(np.float32)
    return offset, *(random.uniform(0.6, 1.0, grid).astype(np.float32) for _ in range(2))


def as_torch(spec: QuantSpec, values: np.ndarray, state: tuple[np.ndarray, ...]):
    grouped = fake_quant.Grouped.of(torch.from_numpy(values), spec)
    offset, low, high = (torch.from_numpy(part) for part in state)
    return grouped, (offset.view_as(grouped.weight), low[..., None], high[..., None])


# --- the product


@pytest.mark.parametrize("spec", SPECS, ids=describe)
def test_product_is_the_sum_over_codes(spec: QuantSpec) -> None:
    linear = fake_quant.reference(weight(), spec)
    x, bias = np.random.default_rng(2).standard_normal((3, 5, 96)).astype(np.float32), np.arange(12.0)
    codes, zero, scales = linear.unpack(), linear.full_zero_points(), linear.scales.astype(np.float64)
    size = 96 // linear.groups
    expected = np.zeros((3, 5, 12)) + bias
    for k in range(96):
        group = k // size
        step = (codes[:, k].astype(np.int64) - zero[:, group].astype(np.int64)) * scales[:, group]
        expected += x[..., k, None].astype(np.float64) * step
    found = group_matmul.reference(x, linear, bias)
    # Both add in float64; what differs is dequantization in float32 (one rounding per weight, 6e-8) and the last cast.
    bound = 2e-7 * (np.abs(x) @ np.abs(linear.dequantize()).T + np.abs(bias))
    assert (np.abs(found - expected) <= bound).all()
    # float32 addition of 96 terms: at most 96 roundings of 6e-8 of the sum of magnitudes.
    assert (np.abs(group_matmul.run(x, linear, bias) - expected) <= 96 * bound).all()


def test_int8_activations_are_rounded_per_block_of_k() -> None:
    x = np.random.default_rng(3).standard_normal((7, 64)).astype(np.float32)
    x[0, :32] = 0
    x[1, 40] = 50  # an outlier coarsens its own block only
    rounded = group_matmul.round_activations(x, 32)
    step = np.abs(x.reshape(7, 2, 32)).max(-1, keepdims=True) / 127
    steps = rounded.reshape(7, 2, 32) / np.where(step == 0, 1, step)
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)
    # At most half a step off; 1e-6 for the roundings of division and multiplication.
    assert (np.abs((rounded - x).reshape(7, 2, 32)) <= step * (0.5 + 1e-6) + 1e-12).all()
    assert (rounded[0, :32] == 0).all()


def test_int8_product_is_the_product_of_rounded_activations() -> None:
    linear = fake_quant.reference(weight(), QuantSpec(4, 32, False))
    x = np.random.default_rng(4).standard_normal((5, 96)).astype(np.float32)
    found = group_matmul.reference(x, linear, int8_block=32)
    np.testing.assert_array_equal(found, group_matmul.reference(group_matmul.round_activations(x, 32), linear))
    assert not np.allclose(found, group_matmul.reference(x, linear), rtol=1e-5)


def test_product_refuses_shapes_that_do_not_fit() -> None:
    linear = fake_quant.reference(weight(), QuantSpec(4, 32))
    with pytest.raises(SpecError, match="K=64"):
        group_matmul.reference(np.zeros((1, 64), np.float32), linear)
    with pytest.raises(SpecError, match="do not divide K=96"):
        group_matmul.reference(np.zeros((1, 96), np.float32), linear, int8_block=64)


# --- fake quantization


@pytest.mark.parametrize("spec", [*SPECS, *POWERS], ids=describe)
def test_torch_and_numpy_give_the_same_bits(spec: QuantSpec) -> None:
    values = weight()
    state = learned(spec, values)
    grouped, tensors = as_torch(spec, values, state)
    fake = fake_quant.run(grouped, *tensors)
    found = fake_quant.to_quantized(grouped, fake)
    assert found.equals(fake_quant.reference(values, spec, *state))
    np.testing.assert_array_equal(found.dequantize(), fake.weight.view(values.shape).numpy())


@pytest.mark.parametrize("spec", SPECS, ids=describe)
def test_nearest_rounding_is_off_by_half_a_step(spec: QuantSpec) -> None:
    values = weight()
    linear = fake_quant.reference(values, spec)
    step = np.repeat(np.abs(linear.scales.astype(np.float32)), 96 // linear.groups, axis=1)
    error = np.abs(linear.dequantize() - values)
    # Half a step inside the range.  A zero point moves the range by up to half a step, float16 scales by 2**-11 of it;
    # symmetric full range leaves the far end of the other side up to one step outside.
    slack = 1.0 + 2**-11 * spec.max_code if not spec.symmetric else 1.5 + 2**-11 * spec.max_code
    assert (error <= slack * step).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_puts_the_largest_magnitude_on_code_zero(bits: int) -> None:
    values = np.array([[0.5, -0.25, 0.1, 0.0] * 4, [-0.5, 0.25, 0.1, 0.0] * 4], np.float32)
    linear = fake_quant.reference(values, QuantSpec(bits, 16, True))
    assert linear.scales[0, 0] < 0 < linear.scales[1, 0]
    assert (linear.unpack()[:, 0] == 0).all()
    np.testing.assert_array_equal(linear.dequantize()[:, 0], [0.5, -0.5])  # powers of two: exact in float16


def test_asymmetric_keeps_zero_exact_and_inside() -> None:
    values = np.concatenate([np.linspace(0.2, 0.9, 15, dtype=np.float32), [0]])[None].astype(np.float32)
    linear = fake_quant.reference(values, QuantSpec(4, 16, False))
    assert linear.full_zero_points()[0, 0] == 0
    assert linear.dequantize()[0, -1] == 0


@pytest.mark.parametrize("spec", POWERS, ids=describe)
def test_powers_of_two_are_the_nearest_by_ratio(spec: QuantSpec) -> None:
    values = weight()
    fine = fake_quant.reference(values, replace(spec, scale_dtype="float32"))
    ratio = fake_quant.reference(values, spec).scales / fine.scales
    assert ((ratio >= 0.5**0.5) & (ratio <= 2**0.5))[:, 0][[0, 1, 2, 4]].all()  # ordinary groups, not dead or tiny ones
    assert (fake_quant.reference(values * 0, spec).scales == 2.0**-24).all()
    with pytest.raises(SpecError, match="not finite"):
        fake_quant.reference(np.full((1, 32), 1e9, np.float32), spec)


def test_dead_groups_get_the_smallest_scale() -> None:
    for spec in (QuantSpec(4, 16, True), QuantSpec(4, 16, False)):
        linear = fake_quant.reference(np.zeros((2, 32), np.float32), spec)
        assert (linear.scales == np.float16(1e-5)).all()
        assert (linear.dequantize() == 0).all()


def test_codes_are_taken_after_the_scale_was_rounded() -> None:
    values = np.random.default_rng(5).standard_normal((4, 32)).astype(np.float32)
    linear = fake_quant.reference(values, QuantSpec(8, 32, True))
    nearest = np.rint(values / linear.scales.astype(np.float32)) + 128
    np.testing.assert_array_equal(linear.unpack(), np.clip(nearest, 0, 255))


def by_autograd(spec: QuantSpec, values: np.ndarray, state: tuple[np.ndarray, ...], gradient: torch.Tensor):
    """The same function written as a graph, with straight-through rounding, differentiated by torch."""
    grouped, tensors = as_torch(spec, values, state)
    offset, low_scale, high_scale = (tensor.clone().requires_grad_() for tensor in tensors)

    def through(rounded: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
        return (rounded - exact).detach() + exact

    low, high = grouped.least * low_scale, grouped.largest * high_scale
    smallest = fake_quant.SMALLEST_SCALE[spec.scale_dtype]

    def stored_of(exact: torch.Tensor) -> torch.Tensor:
        if spec.scale_dtype == "float16":
            return exact.half().float()
        return torch.where(exact < 0, -1.0, 1.0) * 2 ** exact.abs().clamp(min=smallest).log2().round()

    if spec.symmetric:
        sign = torch.where(high < -low, 1.0, -1.0)
        exact = sign * torch.where(high < -low, -low, high) / spec.midpoint
        stored = through(stored_of(exact.detach()), exact)
        scale = torch.where(stored < 0, stored.clamp(max=-smallest), stored.clamp(min=smallest))
        steps = grouped.weight / scale + offset
        steps = through(steps.round(), steps).clamp(-spec.midpoint, spec.midpoint - 1)
    else:
        exact = (high - low) / spec.max_code
        scale = through(stored_of(exact.detach()), exact).clamp(min=smallest)
        zero = through((-low / scale).round(), -low / scale).clamp(max=spec.max_code)
        steps = grouped.weight / scale + offset
        steps = (through(steps.round(), steps) + zero).clamp(0, spec.max_code) - zero
    return torch.autograd.grad((steps * scale * gradient.view_as(steps)).sum(), [offset, low_scale, high_scale])


@pytest.mark.parametrize("spec", [*SPECS, *POWERS], ids=describe)
def test_slopes_are_those_of_the_graph(spec: QuantSpec) -> None:
    values = weight()
    state = learned(spec, values)
    gradient = torch.from_numpy(np.random.default_rng(6).standard_normal(values.shape).astype(np.float32))
    grouped, tensors = as_torch(spec, values, state)
    fake = fake_quant.run(grouped, *tensors)
    found = fake_quant.gradients(grouped, fake, gradient.view_as(grouped.weight), *tensors[1:])
    expected = by_autograd(spec, values, state, gradient)
    for name, ours, theirs in zip(("V", "α", "β"), found, expected, strict=True):
        # Sums of 96 float32 terms, of which many cancel: within 1e-4 of the largest gradient of the tensor.
        worst = float((ours - theirs).abs().max())
        assert worst <= 1e-4 * float(theirs.abs().max()), f"{name}: {worst}"


def test_a_scale_beyond_float16_is_refused() -> None:
    with pytest.raises(SpecError, match="not finite"):
        fake_quant.reference(np.full((1, 32), 1e7, np.float32), QuantSpec(4, 32))


def test_a_group_size_that_does_not_divide_is_refused_by_name() -> None:
    with pytest.raises(SpecError, match=r"layer\.x: group_size 64 does not divide K=96"):
        fake_quant.Grouped.of(torch.zeros(2, 96), QuantSpec(4, 64), "layer.x")


def test_quantized_form_is_valid() -> None:
    linear = fake_quant.reference(weight(), QuantSpec(3, 32, False))
    assert isinstance(linear, QuantizedLinear) and linear.zero_points is not None
