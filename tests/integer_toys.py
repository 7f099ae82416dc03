"""Integer encoders of random weights, whose formats fit what passes through them, with some blocks that do not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from roundexport.kernels import fake_quant, integer_attention, integer_layer_norm, integer_linear, integer_table
from roundexport.kernels._block_format import Format
from roundexport.kernels.integer_attention import IntegerAttention
from roundexport.kernels.integer_encoder import Embedding, IntegerBlock, IntegerEncoder
from roundexport.kernels.integer_layer_norm import IntegerLayerNorm, Summand
from roundexport.kernels.integer_linear import IntegerLinear
from roundexport.kernels.integer_table import IntegerTable
from roundexport.quant.int8_tensor import Int8Tensor
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec


@dataclass
class Toy:
    """Makes parts one after the other; each is given codes and fits its output's format to what comes out."""

    random: np.random.Generator
    block: int = 8
    bits: int = 4
    group: int | None = None
    sum_bits: int = 8
    jitter: int = 1

    def weight(self, rows: int, width: int) -> QuantizedLinear:
        values = self.random.standard_normal((rows, width)).astype(np.float32)
        values *= np.exp2(self.random.integers(-2, 2, (rows, 1))).astype(np.float32) / np.float32(width**0.5)
        return fake_quant.reference(values, QuantSpec(self.bits, self.group, True, "exponent8"))

    def vector(self, width: int, about: float = 0.0, spread: float = 0.3) -> Int8Tensor:
        return Int8Tensor.nearest((about + spread * self.random.standard_normal(width)).astype(np.float32))

    def format(self, values: np.ndarray, bits: int = 8) -> Format:
        """Fits the largest value of a block, give or take a factor of two."""
        width = values.shape[-1]
        most = np.abs(values).reshape(-1, width // self.block, self.block).max((0, 2))
        exponents = np.ceil(np.log2(np.maximum(most, 1e-3))) - (bits - 1)
        exponents += self.random.integers(-self.jitter, self.jitter + 1, exponents.shape)
        return Format(width, exponents.astype(np.int8), bits)

    def linear(self, x: np.ndarray, entering: Format, rows: int, bits: int = 8) -> IntegerLinear:
        parts = self.weight(rows, entering.width), self.vector(rows)
        wide = Format(rows, np.array([0], np.int8))
        raw = IntegerLinear(*parts, entering, wide)
        values = np.ldexp(integer_linear.accumulate(x, raw).astype(np.float64), raw.exponents)
        return IntegerLinear(*parts, entering, self.format(values, bits))

    def norm(self, summands: tuple[Summand, ...], width: int) -> IntegerLayerNorm:
        leaving = self.format(4 * self.random.standard_normal((30, width)))
        return IntegerLayerNorm(summands, self.vector(width, 1.0), self.vector(width), leaving)

    def encoder_block(self, x: np.ndarray, mask: np.ndarray, entering: Format, heads: int, inner: int) -> IntegerBlock:
        width = entering.width
        query, key, value = (self.linear(x, entering, width) for _ in range(3))
        q, k, v = (integer_linear.reference(x, part) for part in (query, key, value))
        attention = IntegerAttention(heads, query.leaving, key.leaving, value.leaving, value.leaving)
        mixed = integer_attention.reference(q, k, v, mask, attention)
        output = self.linear(mixed, attention.leaving, width, self.sum_bits)
        middle = self.norm((Summand.of(output.leaving), Summand.of(entering)), width)
        past = (integer_linear.reference(mixed, output), output.leaving.channels()), (x, entering.channels())
        h = integer_layer_norm.reference(past, middle)
        up = self.linear(h, middle.leaving, inner)
        g = integer_linear.reference(h, up)
        table = IntegerTable("gelu", up.leaving, self.format(np.maximum(up.leaving.values(g), 0)))
        down = self.linear(integer_table.reference(g, table), table.leaving, width, self.sum_bits)
        last = self.norm((Summand.of(down.leaving), Summand.of(middle.leaving)), width)
        return IntegerBlock(query, key, value, attention, output, middle, up, table, down, last)

    def embeddings(self, rows: tuple[int, int, int], width: int) -> tuple[tuple[Embedding, ...], IntegerLayerNorm]:
        tables = tuple(Embedding(self.weight(count, width)) for count in rows)
        return tables, self.norm(tuple(table.summand() for table in tables), width)


def padding(random: np.random.Generator, batch: int, tokens: int) -> np.ndarray:
    """A mask whose rows end earlier or later."""
    return (np.arange(tokens) < random.integers(1, tokens + 1, (batch, 1))).astype(np.int64)


def encoder(toy: Toy, width: int, heads: int, inner: int, blocks: int, tokens: int = 9) -> IntegerEncoder:
    """A whole encoder with a vocabulary of 50 tokens."""
    from roundexport.kernels import integer_encoder

    tables, norm = toy.embeddings((50, tokens, 2), width)
    made = IntegerEncoder((tables[0], tables[1], tables[2]), norm, ())
    ids, mask = toy.random.integers(0, 50, (2, tokens)), padding(toy.random, 2, tokens)
    for _ in range(blocks):
        x = integer_encoder.reference(ids, mask, np.zeros_like(ids), made)
        block = toy.encoder_block(x, mask, made.leaving, heads, inner)
        made = IntegerEncoder(made.embeddings, norm, (*made.blocks, block))
    return made
