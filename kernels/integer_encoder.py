"""A BERT encoder in integers, from token ids to its last hidden states: weights of 4 or 8 bits, everything else of 8.

Every tensor that a layer hands to the next consists of eight-bit codes; each block of neighboring channels has its own
power of two, settled beforehand (_block_format.py).  Sums are int32 and leave as one shift.  Per block of the model:

    x                                             8 bits      from the norm before
    q, k, v = linears of x                        8 bits      integer_linear.py
    i, e    = scores below the largest, exp       8 bits      integer_attention.py: table EXP, table RECIPROCAL
    c       = attention                           8 bits
    o       = linear of c                         8 bits
    h       = norm of o + x                       8 bits      integer_layer_norm.py: table RSQRT; the sum is int32
    g       = linear of h                         8 bits
    a       = GELU of g                           8 bits      integer_table.py
    f       = linear of a                         8 bits
    x       = norm of f + h                       8 bits

and before the first block  x = norm of (row of the token + row of its position + row of its type), whose rows are codes
of 4 bits with a power of two each.  o and f may have 16 bits instead, as they only meet an addition.

No float number takes part.  Tables hold what floats computed once: exp, reciprocals, roots, GELU.

`reference` is numpy in int32 and follows the formulas; `Simulation` is torch, equal to it bit for bit and fast enough
to evaluate a model.  In: ids, mask and token types [B, T].  Out: codes [B, T, C] in the last norm's format.  Limits:
encoders with the norm behind the addition, as BERT has it (post-norm), absolute positions, masks of padding.

Source: the idea is BCT, arXiv 2304.01483: every tensor by blocks, shifts for scales, tables for functions, integers
only, no retraining.  Its text and code were not at hand: formats, bounds and tables here are our own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import SpecError
from roundexport.quant.quantized_linear import QuantizedLinear

from . import integer_attention, integer_layer_norm, integer_linear, integer_table
from ._block_format import Format, Integers
from .integer_attention import IntegerAttention
from .integer_layer_norm import IntegerLayerNorm, Summand
from .integer_linear import IntegerLinear, exponents_of
from .integer_table import IntegerTable

if TYPE_CHECKING:
    from torch import Tensor

available = integer_linear.available


@dataclass(frozen=True, eq=False)
class IntegerBlock:
    """One block; each part's formats are those of its neighbors.

    Raises:
        SpecError: a part takes another format than the one before it gives.
    """

    query: IntegerLinear
    key: IntegerLinear
    value: IntegerLinear
    attention: IntegerAttention
    output: IntegerLinear
    middle_norm: IntegerLayerNorm
    up: IntegerLinear
    table: IntegerTable
    down: IntegerLinear
    last_norm: IntegerLayerNorm

    def __post_init__(self) -> None:
        meet = (
            (self.query.leaving, self.attention.queries),
            (self.key.leaving, self.attention.keys),
            (self.value.leaving, self.attention.values),
            (self.attention.leaving, self.output.entering),
            (self.middle_norm.leaving, self.up.entering),
            (self.up.leaving, self.table.entering),
            (self.table.leaving, self.down.entering),
            *((linear.entering, self.query.entering) for linear in (self.key, self.value)),
        )
        for given, taken in meet:
            if given is not taken and (given.bits, given.exponents.tolist()) != (taken.bits, taken.exponents.tolist()):
                raise SpecError(f"{self.query.name}: parts of its block do not meet in one format")


@dataclass(frozen=True, eq=False)
class Embedding:
    """A table [rows, C] in integers, symmetric, its scales powers of two."""

    weight: QuantizedLinear

    @cached_property
    def codes(self) -> NDArray[np.int16]:
        """Signed codes [rows, C]."""
        sign, _ = exponents_of(self.weight.scales)
        centered = self.weight.unpack().astype(np.int16) - np.int16(self.weight.spec.midpoint)
        return centered * np.repeat(sign.astype(np.int16), self.weight.in_features // self.weight.groups, 1)

    @cached_property
    def exponents(self) -> Integers:
        """Of every group, int32 [rows, G]."""
        return exponents_of(self.weight.scales)[1]

    def summand(self) -> Summand:
        """What a row adds to a norm's sum."""
        return Summand(int(self.exponents.min()), int(self.exponents.max()), self.weight.spec.midpoint)

    def rows(self, ids: NDArray[np.integer]) -> tuple[Integers, Integers]:
        """Codes and exponents of rows, int32 [..., C] each."""
        width = self.weight.in_features // self.weight.groups
        return self.codes[ids].astype(np.int32), np.repeat(self.exponents[ids], width, -1)


@dataclass(frozen=True, eq=False)
class IntegerEncoder:
    """The whole encoder.

    Args:
        embeddings: tables of tokens, positions and token types.
        norm: of their sum.
        blocks: in order.
    """

    embeddings: tuple[Embedding, Embedding, Embedding]
    norm: IntegerLayerNorm
    blocks: tuple[IntegerBlock, ...]

    @property
    def leaving(self) -> Format:
        """Format of the last hidden states."""
        return self.blocks[-1].last_norm.leaving if self.blocks else self.norm.leaving


def block_reference(x: Integers, mask: NDArray[np.integer], block: IntegerBlock) -> Integers:
    """Codes after a block, of codes before it [B, T, C] and the mask of what is no padding [B, T]."""
    q, k, v = (integer_linear.reference(x, linear) for linear in (block.query, block.key, block.value))
    mixed = integer_attention.reference(q, k, v, mask, block.attention)
    output = integer_linear.reference(mixed, block.output)
    past = (output, block.output.leaving.channels()), (x, block.query.entering.channels())
    middle = integer_layer_norm.reference(past, block.middle_norm)
    inner = integer_table.reference(integer_linear.reference(middle, block.up), block.table)
    down = integer_linear.reference(inner, block.down)
    past = (down, block.down.leaving.channels()), (middle, block.up.entering.channels())
    return integer_layer_norm.reference(past, block.last_norm)


def reference(
    ids: NDArray[np.integer], mask: NDArray[np.integer], types: NDArray[np.integer], encoder: IntegerEncoder
) -> Integers:
    """Codes of the last hidden states [B, T, C]; positions count from 0."""
    where = (ids, np.broadcast_to(np.arange(ids.shape[1]), ids.shape), types)
    rows = [table.rows(index) for table, index in zip(encoder.embeddings, where, strict=True)]
    x = integer_layer_norm.reference(rows, encoder.norm)
    for block in encoder.blocks:
        x = block_reference(x, mask, block)
    return x


class BlockSimulation:
    """A block in torch, on codes that are held in float32.

    Args:
        block: to compute.
    """

    def __init__(self, block: IntegerBlock) -> None:
        import torch

        self._linears = [
            integer_linear.Simulation(linear)
            for linear in (block.query, block.key, block.value, block.output, block.up, block.down)
        ]
        self._attention = integer_attention.Simulation(block.attention)
        self._middle_norm = integer_layer_norm.Simulation(block.middle_norm)
        self._last_norm = integer_layer_norm.Simulation(block.last_norm)
        self._table = integer_table.Simulation(block.table)
        formats = (block.query.entering, block.output.leaving, block.up.entering, block.down.leaving)
        self._exponents = [torch.from_numpy(tensor.channels()) for tensor in formats]

    def __call__(self, x: Tensor, mask: Tensor) -> Tensor:
        """Codes after the block [B, T, C]."""
        query, key, value, output, up, down = self._linears
        enter, after_attention, middle, after_down = self._exponents
        mixed = self._attention(query(x), key(x), value(x), mask)
        h = self._middle_norm(((output(mixed), after_attention), (x, enter)))
        return self._last_norm(((down(self._table(up(h))), after_down), (h, middle)))


class Simulation:
    """The encoder in torch.

    Args:
        encoder: to compute.
    """

    def __init__(self, encoder: IntegerEncoder) -> None:
        import torch

        self._tables = [(torch.from_numpy(e.codes), torch.from_numpy(e.exponents)) for e in encoder.embeddings]
        self._norm = integer_layer_norm.Simulation(encoder.norm)
        self._blocks = [BlockSimulation(block) for block in encoder.blocks]

    def __call__(self, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        """Codes of the last hidden states [B, T, C], float32."""
        import torch

        where = (ids, torch.arange(ids.shape[1]).expand_as(ids), types)
        rows = []
        for (codes, exponents), index in zip(self._tables, where, strict=True):
            width = codes.shape[1] // exponents.shape[1]
            rows.append((codes[index], exponents[index].repeat_interleave(width, -1)))
        x = self._norm(rows)
        for block in self._blocks:
            x = block(x, mask)
        return x


def run(ids: Tensor, mask: Tensor, types: Tensor, encoder: IntegerEncoder) -> Tensor:
    """:func:`reference` in torch; codes float32."""
    return Simulation(encoder)(ids, mask, types)
