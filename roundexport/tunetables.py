"""Tables rounded in parts: a token embedding or an lm_head is as large as several blocks, and never whole in memory.

Rows are rounded independently of each other, so parts of a table give the very integers that the whole would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .quantized import QuantizedLinear
from .spec import LinearInfo, QuantSpec
from .streaming import Weights

Quantize = Callable[[Tensor, QuantSpec], QuantizedLinear]
NO_ROWS = torch.empty(0, dtype=torch.long)


@dataclass(frozen=True, eq=False)
class RoundedTable:
    """A table as integers, and some of its rows.

    Args:
        linear: the whole table.
        floats: the rows asked for as they were, float32 [U, K].
        rounded: what they became.
    """

    linear: QuantizedLinear
    floats: Tensor
    rounded: Tensor


def round_table(
    weights: Weights, info: LinearInfo, spec: QuantSpec, quantize: Quantize, ids: Tensor = NO_ROWS
) -> RoundedTable:
    """Round a table to integers, some rows at a time.

    Args:
        weights: the model.
        info: the table; its weight is stored [N, K].
        spec: the scheme.
        quantize: rounds a weight [N, K] row by row.
        ids: rows whose values are wanted too, ascending.

    Raises:
        SpecError: the scheme does not fit.
    """
    parts: list[QuantizedLinear] = []
    floats, rounded = (torch.empty(len(ids), info.in_features) for _ in range(2))
    begin = done = 0
    for part in weights.parts(f"{info.name}.weight"):
        parts.append(quantize(part, spec))
        inside = ids[(ids >= begin) & (ids < begin + len(part))] - begin
        if len(inside):
            place = slice(done, done + len(inside))
            floats[place] = part[inside]
            rounded[place] = torch.from_numpy(_select(parts[-1], inside.numpy()).dequantize())
        begin, done = begin + len(part), done + len(inside)
    return RoundedTable(_join(parts), floats, rounded)


def _select(linear: QuantizedLinear, rows: NDArray[np.int64]) -> QuantizedLinear:
    zero = None if linear.zero_points is None else linear.zero_points[rows]
    return QuantizedLinear(linear.spec, linear.in_features, linear.codes[rows], linear.scales[rows], zero)


def _join(parts: list[QuantizedLinear]) -> QuantizedLinear:
    spec, width = parts[0].spec, parts[0].in_features
    codes, scales = (np.concatenate([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
    zero = None if spec.symmetric else np.concatenate([part.full_zero_points() for part in parts])
    return QuantizedLinear(spec, width, codes, scales, zero)
