"""The integer encoder: numpy and torch agree to the bit, nothing overflows, and it means what the floats mean."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from integer_toys import Toy, encoder, padding

from roundexport.errors import SpecError
from roundexport.kernels import integer_attention, integer_encoder, integer_layer_norm, integer_linear, integer_table
from roundexport.kernels._block_format import LIMIT, Format, shift, shift_tensor
from roundexport.kernels.integer_attention import IntegerAttention
from roundexport.kernels.integer_layer_norm import IntegerLayerNorm, Summand
from roundexport.kernels.integer_linear import IntegerLinear
from roundexport.kernels.integer_table import IntegerTable
from roundexport.quant.int8_tensor import Int8Tensor
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec


def toy(seed: int, **changes: int | None) -> Toy:
    return Toy(np.random.default_rng(seed), **changes)  # type: ignore[arg-type]


def codes(random: np.random.Generator, *shape: int) -> np.ndarray:
    return np.clip(np.rint(40 * random.standard_normal(shape)), -128, 127).astype(np.int32)


def flat(width: int, exponent: int, bits: int = 8) -> Format:
    return Format(width, np.array([exponent], np.int8), bits)


# --- shifts and formats


def test_a_shift_rounds_half_up_and_never_leaves_int32() -> None:
    numbers = np.array([0, 1, -1, 3, -3, 5, 6, -6, LIMIT, -LIMIT, 2**31 - 2, -(2**31)], np.int32)
    for by in range(1, 40):
        assert shift(numbers, by).tolist() == [math.floor(int(n) / 2**by + 0.5) for n in numbers]
        assert shift(numbers, -by).tolist() == [max(-LIMIT, min(LIMIT, int(n) << by)) for n in numbers]
    assert shift(numbers, 0).tolist() == numbers.tolist()
    every = np.arange(-40, 40, dtype=np.int32)[:, None]
    assert np.array_equal(shift_tensor(torch.from_numpy(numbers), torch.from_numpy(every)), shift(numbers, every))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Format(8, np.zeros(3, np.int8)), "3 blocks do not divide 8"),
        (lambda: Format(8, np.zeros(2, np.int64)), "must be int8"),
        (lambda: Format(8, np.array([64], np.int8)), "from -64 to 63"),
        (lambda: flat(8, 0, 4), "8 or 16 bits, not 4"),
        (lambda: IntegerTable("sine", flat(8, 0), flat(8, 0)), "no table for 'sine'"),
        (lambda: IntegerAttention(3, *[flat(8, 0)] * 4), "3 heads"),
    ],
)
def test_formats_that_make_no_sense_are_refused(wrong: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        wrong()  # type: ignore[operator]


def test_sums_that_int32_might_not_hold_are_refused() -> None:
    random = toy(0)
    parts = random.weight(4, 16), random.vector(4)
    apart = Format(16, np.array([-20, 0], np.int8))
    with pytest.raises(SpecError, match=r"more than 2\*\*30"):
        IntegerLinear(*parts, apart, flat(4, 0))
    with pytest.raises(SpecError, match=r"more than 2\*\*30"):
        IntegerAttention(1, apart, flat(16, 0), flat(16, 0), flat(16, 0))


# --- numpy and torch, bit for bit


@pytest.mark.parametrize(("bits", "group", "block"), list(itertools.product((4, 8), (None, 16), (8, 32))))
def test_linears_agree_to_the_bit(bits: int, group: int | None, block: int) -> None:
    made = toy(bits + block, bits=bits, group=group, block=block)
    x, entering = codes(made.random, 3, 7, 64), made.format(made.random.standard_normal((9, 64)))
    linear = made.linear(x, entering, 96)
    expected = integer_linear.reference(x, linear)
    assert len(np.unique(expected)) > 100
    assert np.array_equal(integer_linear.run(torch.from_numpy(x).float(), linear).numpy(), expected)


def test_a_linear_with_a_large_bound_agrees_too() -> None:
    made = toy(3, bits=8, block=16)
    entering = Format(64, np.array([-12, -4, -8, -5], np.int8))
    x = codes(made.random, 50, 64)
    linear = made.linear(x, entering, 32)
    assert linear.bound.max() > integer_linear.FLOAT32_EXACT
    assert np.array_equal(
        integer_linear.run(torch.from_numpy(x).float(), linear).numpy(), integer_linear.reference(x, linear)
    )


def test_a_linear_means_the_float_linear() -> None:
    made = toy(4, group=16, jitter=0)
    x, entering = codes(made.random, 40, 64), made.format(made.random.standard_normal((9, 64)))
    linear = made.linear(x, entering, 32)
    exact = entering.values(x) @ linear.weight.dequantize().T.astype(np.float64) + linear.bias.values()
    got = linear.leaving.values(integer_linear.reference(x, linear))
    half = np.ldexp(0.5, linear.leaving.channels()) + np.ldexp(0.5, linear.exponents)
    assert (np.abs(got - exact) <= half).all()


def test_the_worst_inputs_stay_below_the_bound() -> None:
    made = toy(5, bits=8, group=16, block=16)
    linear = made.linear(codes(made.random, 5, 64), made.format(made.random.standard_normal((9, 64))), 16)
    worst = np.where(linear.codes < 0, 127, -128)  # a row of inputs for every row of weights
    wide = np.repeat(linear.shifts, linear.block, 1).astype(np.int64)
    exact = (worst[:, None].astype(np.int64) * linear.codes << wide).sum(-1) + linear.aligned_bias
    assert np.array_equal(integer_linear.accumulate(worst.astype(np.int32), linear), exact)
    assert (np.abs(exact).max(0) <= linear.bound).all()


@pytest.mark.parametrize(("heads", "block", "tokens"), [(1, 32, 5), (4, 8, 33), (2, 4, 130)])
def test_attention_agrees_to_the_bit_and_means_softmax(heads: int, block: int, tokens: int) -> None:
    random = np.random.default_rng(heads)
    made = Toy(random, block)
    q, k, v = (codes(random, 2, tokens, 32) for _ in range(3))
    formats = [made.format(random.standard_normal((9, 32))) for _ in range(3)]
    mask = padding(random, 2, tokens)
    attention = IntegerAttention(heads, *formats, formats[2])
    expected = integer_attention.reference(q, k, v, mask, attention)
    tensors = [torch.from_numpy(a).float() for a in (q, k, v)]
    assert np.array_equal(integer_attention.run(*tensors, torch.from_numpy(mask), attention).numpy(), expected)
    size = 32 // heads
    qf, kf, vf = (
        torch.from_numpy(f.values(c)).view(2, tokens, heads, size).transpose(1, 2)
        for f, c in zip(formats, (q, k, v), strict=True)
    )
    seen = torch.from_numpy(mask)[:, None, None].bool()
    exact = torch.nn.functional.scaled_dot_product_attention(qf, kf, vf, seen).transpose(1, 2).reshape(2, tokens, 32)
    error = (torch.from_numpy(attention.leaving.values(expected)) - exact).abs().max() / exact.abs().max()
    assert error < 0.08


@pytest.mark.parametrize("width", [24, 384, 512, 1024])
def test_norms_agree_to_the_bit_and_mean_the_norm(width: int) -> None:
    made = toy(width, jitter=0)
    first, second = (made.format(made.random.standard_normal((9, width)), bits) for bits in (16, 8))
    norm = made.norm((Summand.of(first), Summand.of(second)), width)
    a, b = 200 * codes(made.random, 40, width), codes(made.random, 40, width)
    b[0], a[1], a[2, 0] = 127, 0, -32768
    a[3] = b[3] = 0
    summands = ((a, first.channels()), (b, second.channels()))
    expected = integer_layer_norm.reference(summands, norm)
    tensors = [(torch.from_numpy(c), torch.from_numpy(e)) for c, e in summands]
    assert np.array_equal(integer_layer_norm.run(tensors, norm).numpy(), expected)
    total = torch.from_numpy(first.values(a) + second.values(b))
    weights = [torch.from_numpy(t.values().astype(np.float64)) for t in (norm.weight, norm.bias)]
    exact = torch.nn.functional.layer_norm(total, (width,), *weights, eps=1e-12).numpy()
    step = np.ldexp(1.0, norm.leaving.channels())
    held = np.clip(exact, -128 * step, 127 * step)
    assert np.abs(norm.leaving.values(expected) - held).max() < 0.75 * step.max() + 0.012 * np.abs(held).max()


def test_the_worst_norm_stays_within_int32() -> None:
    width = 512
    wide = Summand(0, 0, 128)
    norm = IntegerLayerNorm(
        (wide, wide),
        Int8Tensor(np.full(width, -128, np.int8), 1.0),
        Int8Tensor(np.zeros(width, np.int8), 1.0),
        flat(width, 0),
    )
    for row in (np.full(width, -128), np.where(np.arange(width) % 2, 127, -128), 127 * (np.arange(width) == 0)):
        codes_ = np.asarray(row, np.int32)[None]
        summands = ((codes_, np.int32([0])), (codes_, np.int32([0])))
        got = integer_layer_norm.reference(summands, norm)
        total = 2.0 * row
        exact = -128 * (total - total.mean()) / max(total.std(), 1e-9)
        assert np.abs(got - np.clip(exact, -128, 127)).max() <= 1


def test_a_table_is_the_function_at_all_codes() -> None:
    entering, leaving = Format(4, np.array([-4, -5], np.int8)), Format(4, np.array([-5, -4], np.int8))
    table = IntegerTable("gelu", entering, leaving)
    x = np.repeat(np.arange(-128, 128, dtype=np.int32)[:, None], 4, 1)
    exact = leaving.codes(torch.nn.functional.gelu(torch.from_numpy(entering.values(x))).numpy())
    assert np.array_equal(integer_table.reference(x, table), exact)
    assert np.array_equal(integer_table.run(torch.from_numpy(x).float(), table).numpy(), exact)
    assert len(table.tables) == 2


@pytest.mark.parametrize(
    ("changes", "shape"),
    [({}, (32, 4, 64)), ({"sum_bits": 16, "bits": 8}, (48, 2, 96)), ({"group": 16, "jitter": 3}, (64, 4, 128))],
)
def test_encoders_agree_to_the_bit(changes: dict[str, int], shape: tuple[int, int, int]) -> None:
    made = toy(11, **changes)
    whole = encoder(made, *shape, blocks=2)
    ids, mask = made.random.integers(0, 50, (5, 9)), padding(made.random, 5, 9)
    types = made.random.integers(0, 2, (5, 9))
    expected = integer_encoder.reference(ids, mask, types, whole)
    assert len(np.unique(expected)) > 60
    assert np.array_equal(integer_encoder.run(*map(torch.from_numpy, (ids, mask, types)), whole).numpy(), expected)


def test_a_block_of_the_shapes_of_minilm_agrees_to_the_bit() -> None:
    made = toy(12, block=32)
    x, mask = codes(made.random, 2, 24, 384), padding(made.random, 2, 24)
    block = made.encoder_block(x, mask, made.format(made.random.standard_normal((30, 384))), 12, 1536)
    expected = integer_encoder.block_reference(x, mask, block)
    got = integer_encoder.BlockSimulation(block)(torch.from_numpy(x).float(), torch.from_numpy(mask))
    assert len(np.unique(expected)) > 100
    assert np.array_equal(got.numpy(), expected)


def test_parts_that_do_not_meet_are_refused() -> None:
    made = toy(13)
    x, mask = codes(made.random, 1, 4, 32), np.ones((1, 4), np.int64)
    block = made.encoder_block(x, mask, made.format(made.random.standard_normal((30, 32))), 4, 64)
    other = made.encoder_block(x, mask, made.format(made.random.standard_normal((30, 32))), 4, 64)
    with pytest.raises(SpecError, match="do not meet"):
        integer_encoder.IntegerBlock(**{**vars_of(block), "attention": other.attention})
    asymmetric = QuantizedLinear.from_unpacked(
        QuantSpec(4, None, False, "exponent8"),
        np.zeros((2, 8), np.uint8),
        np.ones((2, 1), np.float32),
        np.ones((2, 1), np.uint8),
    )
    with pytest.raises(SpecError, match="symmetric"):
        IntegerLinear(asymmetric, made.vector(2), flat(8, 0), flat(2, 0))


def vars_of(block: integer_encoder.IntegerBlock) -> dict[str, object]:
    return {name: getattr(block, name) for name in block.__dataclass_fields__}
