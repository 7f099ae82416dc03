"""From a float encoder to an integer one, block by block: formats by block statistics, weights rounded for integers.

Two streams of calibration tokens walk through the model side by side, the float one and the integer one.  In each block

    1  the float stream runs; every intermediate tensor of it gives that tensor's format (shifts.py)
    2  stage by stage (query, key, value; output; up; down) a rounder gives the weights.  It sees what the float linear
       gets and what the integer encoder, quantized so far, gives it instead
    3  the integer stream runs through what was just made

so weights are rounded for the very integers that they will meet.  A rounder that ignores both takes weights from an
artifact.  Norms' weights and all biases have eight bits and one exponent each (quant/int8_tensor.py).

In: a float encoder, token ids [S, T] without padding, a rounder.  Out: an IntegerEncoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from roundexport.errors import UsageError
from roundexport.kernels import integer_attention, integer_encoder, integer_layer_norm, integer_linear, integer_table
from roundexport.kernels._block_format import Format
from roundexport.kernels.integer_attention import IntegerAttention
from roundexport.kernels.integer_encoder import Embedding, IntegerBlock, IntegerEncoder
from roundexport.kernels.integer_layer_norm import IntegerLayerNorm, Summand
from roundexport.kernels.integer_linear import IntegerLinear
from roundexport.kernels.integer_table import IntegerTable
from roundexport.quant.int8_tensor import Int8Tensor
from roundexport.quant.quantized_linear import QuantizedLinear

from . import shifts
from .float_encoder import EMBEDDING_NORM, LINEARS, NORMS, SUMMED, TABLES, FloatEncoder

_INPUTS = {"query": "x", "key": "x", "value": "x", "output": "mixed", "up": "middle", "down": "inner"}
_STATISTICS = 4096  # tokens that formats are fitted to
_SPREAD_OF_SUMS, _SPREAD_OF_SCORES = 10, 4  # sums of two tensors; products of two that are not weights


@dataclass(frozen=True)
class IntegerSettings:
    """How intermediates are stored.

    Args:
        block: channels that share an exponent.
        sum_bits: of the tensors that only meet an addition before a norm, 8 or 16.
        input_spread: most difference of exponents within a tensor that linears read; None: as far as int32 reaches.
        batch_size: samples that run at a time.

    Raises:
        UsageError: a value is out of range.
    """

    block: int = 4
    sum_bits: int = 8
    input_spread: int | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.block < 1 or self.batch_size < 1 or self.sum_bits not in (8, 16):
            raise UsageError(
                f"block and batch_size are at least 1 and sum_bits 8 or 16: {self.block}, {self.batch_size}, "
                f"{self.sum_bits}"
            )


@dataclass(frozen=True, eq=False)
class Stage:
    """Linears that read the same tensor, and that tensor on both sides.

    Args:
        weights: float weights [N, K] and biases [N] by the linear's name.
        given: what the integer encoder gives them, [S, T, K].
        floats: what the float model gives them.
        residual: what the float model adds their output to, less what the integer encoder does, [S, T, N]; None where
            their output is not added to anything.
    """

    weights: Mapping[str, tuple[Tensor, Tensor]]
    given: Tensor
    floats: Tensor
    residual: Tensor | None = None


class Rounder(Protocol):
    """Gives integers for weights."""

    def tables(self, encoder: FloatEncoder, ids: NDArray[np.int64]) -> Mapping[str, QuantizedLinear]:
        """The embedding tables by name, `TABLES`."""

    def stage(self, stage: Stage) -> Mapping[str, tuple[QuantizedLinear, Int8Tensor]]:
        """Weight and bias of every linear of a stage."""

    def vector(self, name: str, values: NDArray[np.float32]) -> Int8Tensor:
        """A norm's weight or bias."""


def calibrate(
    encoder: FloatEncoder,
    ids: NDArray[np.int64],
    rounder: Rounder,
    settings: IntegerSettings | None = None,
    report: Callable[[float], None] = lambda share: None,
) -> IntegerEncoder:
    """Make the integer encoder.

    Args:
        encoder: the float model.
        ids: calibration tokens [S, T], no padding.
        rounder: gives the weights.
        settings: how intermediates are stored.
        report: told the share that is done, after every block.

    Raises:
        SpecError: a scheme that integers cannot be made of here (asymmetric, or scales that are no powers of two).
        RoundexportError: activations that are not finite.
    """
    with torch.no_grad():
        return _Calibration(encoder, rounder, settings or IntegerSettings(), torch.from_numpy(ids)).run(report)


class _Calibration:
    """Both streams on their way."""

    def __init__(self, encoder: FloatEncoder, rounder: Rounder, settings: IntegerSettings, ids: Tensor) -> None:
        self._float, self._rounder, self._settings, self._ids = encoder, rounder, settings, ids
        self._statistics = max(1, min(len(ids), _STATISTICS // ids.shape[1]))

    def run(self, report: Callable[[float], None]) -> IntegerEncoder:
        """Table by table, then block by block."""
        found = self._rounder.tables(self._float, self._ids.numpy())
        tables = [Embedding(found[name]) for name in TABLES]
        floats = self._batched(lambda ids: self._float.embed(ids, torch.zeros_like(ids)), self._ids)
        norm = self._norm(EMBEDDING_NORM, tuple(t.summand() for t in tables), self._fit("embedded", floats))
        made = IntegerEncoder((tables[0], tables[1], tables[2]), norm, ())
        start = integer_encoder.Simulation(made)
        states = self._batched(lambda ids: start(ids, torch.ones_like(ids), torch.zeros_like(ids)), self._ids)
        entering = norm.leaving
        blocks = []
        for index in range(self._float.layers):
            floats, states, block = self._block(index, floats, states, entering)
            blocks.append(block)
            entering = block.last_norm.leaving
            report((index + 1) / self._float.layers)
        return IntegerEncoder(made.embeddings, norm, tuple(blocks))

    def _block(
        self, index: int, floats: Tensor, states: Tensor, entering: Format
    ) -> tuple[Tensor, Tensor, IntegerBlock]:
        inputs, formats, after = self._float_side(index, floats)
        past = floats - shifts.values_of(states, entering)  # what the sum before a norm lacks already

        def stage(
            tensors: Sequence[str], codes: Tensor, given: Format, residual: Tensor | None = None
        ) -> list[IntegerLinear]:
            names = {self._float.linear(index, tensor): tensor for tensor in tensors}
            weights = {n: (self._float.weights[f"{n}.weight"], self._float.weights[f"{n}.bias"]) for n in names}
            side = Stage(weights, shifts.values_of(codes, given), inputs.pop(_INPUTS[tensors[0]]), residual)
            found = self._rounder.stage(side)
            return [IntegerLinear(*found[name], given, formats[tensor], name) for name, tensor in names.items()]

        query, key, value = stage(("query", "key", "value"), states, entering)
        attention = IntegerAttention(
            self._float.heads, query.leaving, key.leaving, value.leaving, formats["mixed"], f"encoder.layer.{index}"
        )
        mixed = self._attend(states, (query, key, value), attention)
        (output,) = stage(("output",), mixed, attention.leaving, past)
        middle_norm = self._norm(
            self._float.norm_name(index, "middle"),
            (Summand.of(output.leaving), Summand.of(entering)),
            formats["middle"],
        )
        middle = self._normalize(middle_norm, (mixed, output), (states, entering))
        past = inputs["middle"] - shifts.values_of(middle, middle_norm.leaving)
        (up,) = stage(("up",), middle, middle_norm.leaving)
        table = IntegerTable(self._float.activation, up.leaving, formats["inner"], up.name)
        sides = integer_linear.Simulation(up), integer_table.Simulation(table)
        inner = self._batched(lambda codes: sides[1](sides[0](codes)), middle)
        (down,) = stage(("down",), inner, table.leaving, past)
        last_norm = self._norm(
            self._float.norm_name(index, "last"),
            (Summand.of(down.leaving), Summand.of(middle_norm.leaving)),
            formats["last"],
        )
        last = self._normalize(last_norm, (inner, down), (middle, middle_norm.leaving))
        block = IntegerBlock(query, key, value, attention, output, middle_norm, up, table, down, last_norm)
        return after, last, block

    def _float_side(self, index: int, floats: Tensor) -> tuple[dict[str, Tensor], dict[str, Format], Tensor]:
        """What linears read in the float model, every tensor's format, and the block's output."""
        kept: dict[str, list[Tensor]] = {}
        some = self._statistics

        def tap(name: str, values: Tensor) -> Tensor:
            got = kept.setdefault(name, [])
            if name in _INPUTS.values() or sum(map(len, got)) < some:
                got.append(values)
            return values

        def block(x: Tensor) -> Tensor:
            return self._float.run_block(index, x, torch.ones(x.shape[:2]), tap)

        after = self._batched(block, floats)
        tensors = {name: torch.cat(kept.pop(name)) for name in list(kept)}
        formats = {name: self._fit(name, values) for name, values in tensors.items()}
        inputs = {name: values for name, values in tensors.items() if name in _INPUTS.values()}
        return {**inputs, "x": floats}, formats, after

    def _fit(self, name: str, values: Tensor) -> Format:
        some = values[: self._statistics].flatten(0, 1)
        bits = self._settings.sum_bits if name in SUMMED else 8
        if name in ("query", "key"):
            spread = _SPREAD_OF_SCORES
        elif name in (*SUMMED, "value", "up"):
            spread = _SPREAD_OF_SUMS
        else:  # a linear reads it
            spread = shifts.widest_spread(some.shape[1], 8)
            if self._settings.input_spread is not None:
                spread = min(spread, self._settings.input_spread)
        return shifts.fit(some, self._settings.block, bits, spread)

    def _norm(self, name: str, summands: tuple[Summand, ...], leaving: Format) -> IntegerLayerNorm:
        parts = [f"{name}.{part}" for part in ("weight", "bias")]
        weight, bias = (self._rounder.vector(part, self._float.weights[part].numpy()) for part in parts)
        return IntegerLayerNorm(summands, weight, bias, leaving, name)

    def _attend(self, states: Tensor, linears: Sequence[IntegerLinear], attention: IntegerAttention) -> Tensor:
        query, key, value = (integer_linear.Simulation(linear) for linear in linears)
        attend = integer_attention.Simulation(attention)
        return self._batched(lambda x: attend(query(x), key(x), value(x), torch.ones(x.shape[:2])), states)

    def _normalize(
        self, norm: IntegerLayerNorm, layer: tuple[Tensor, IntegerLinear], past: tuple[Tensor, Format]
    ) -> Tensor:
        linear, normalize = integer_linear.Simulation(layer[1]), integer_layer_norm.Simulation(norm)
        exponents = [torch.from_numpy(tensor.channels()) for tensor in (layer[1].leaving, past[1])]
        return self._batched(
            lambda entered, x: normalize(((linear(entered), exponents[0]), (x, exponents[1]))), layer[0], past[0]
        )

    def _batched(self, run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        size = self._settings.batch_size
        parts = [run(*(t[start : start + size] for t in tensors)) for start in range(0, len(tensors[0]), size)]
        return torch.cat(parts)


assert set(_INPUTS) == set(LINEARS) and set(NORMS) == {"middle", "last"}
