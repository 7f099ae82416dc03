"""Calibration of an integer tensor's format by the statistics of its blocks alone: no gradients, nothing trained.

A block of channels gets the exponent with the least squared error over the calibration tokens,

    e = argmin Σ (clip(round(v / 2**e)) · 2**e - v)²        e from the least that clips nothing down to three below it

so that a block whose largest value is rare is clipped and all its others are two, four or eight times finer.  Blocks
of one tensor may not lie further apart than a sum that meets them all can hold; finer ones are then raised.

In: values [tokens, C].  Out: a Format.  Limits: what calibration never saw may be clipped.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from roundexport.errors import RoundexportError, UsageError
from roundexport.kernels._block_format import LEAST, LIMIT, MOST, Format, rounded_tensor

_FINER = 3  # exponents tried below the one that clips nothing


def fit(values: Tensor, block: int, bits: int = 8, spread: int = MOST - LEAST) -> Format:
    """The format of a tensor by what passes through it.

    Args:
        values: float [tokens, C].
        block: channels that share an exponent; at most C, cut down to the next divisor of C.
        bits: of a code.
        spread: most difference of two exponents.

    Raises:
        RoundexportError: values that are not finite.
    """
    width = values.shape[-1]
    block = divisor(width, block)
    grouped = values.reshape(-1, width // block, block)
    most = grouped.abs().amax((0, 2)).double().numpy()
    if not np.isfinite(most).all():
        raise RoundexportError("activations are not finite numbers; the model is unusable")
    # frexp: most < 2**e, so codes of b bits hold it at e - (b - 1); where all are 0 any exponent does.
    whole = np.where(most > 0, np.frexp(most)[1] - (bits - 1), LEAST)
    errors = [_error(grouped, whole - finer, bits) for finer in range(_FINER + 1)]
    best = whole - np.argmin(errors, 0)
    dead = most == 0
    best = np.where(dead, 0 if dead.all() else best[~dead].max(), best)
    best = np.clip(np.maximum(best, best.max() - spread), LEAST, MOST)
    return Format(width, best.astype(np.int8), bits)


def divisor(width: int, most: int) -> int:
    """The largest divisor of a width up to ``most``.

    Raises:
        UsageError: ``most`` is not positive.
    """
    if most < 1:
        raise UsageError(f"blocks have at least 1 channel, not {most}")
    return next(size for size in range(min(most, width), 0, -1) if width % size == 0)


def widest_spread(width: int, weight_bits: int) -> int:
    """How far exponents of inputs may lie apart so that a row of a linear is certain to stay within its limit.

    Args:
        width: K.
        weight_bits: of a weight's code.
    """
    return max(0, int(math.log2(LIMIT / 2 / (width << (weight_bits - 1) << 7))))


def rounded(values: Tensor, tensor: Format) -> Tensor:
    """Values [..., C] after a format, as :meth:`Format.codes` and ``values`` have it, float32."""
    return rounded_tensor(values, tensor)


def codes(values: Tensor, tensor: Format) -> Tensor:
    """Codes [..., C] of values, float32."""
    return (values / _steps(tensor)).add_(0.5).floor_().clamp_(tensor.least, -tensor.least - 1)


def values_of(found: Tensor, tensor: Format) -> Tensor:
    """Values [..., C] of codes, float32."""
    return found * _steps(tensor)


def _steps(tensor: Format) -> Tensor:
    return torch.from_numpy(np.ldexp(np.float32(1), tensor.channels()))


def _error(grouped: Tensor, exponents: np.ndarray, bits: int) -> np.ndarray:
    step = torch.from_numpy(np.ldexp(np.float32(1), exponents))[:, None]
    least = -(1 << (bits - 1))
    again = (grouped / step).add_(0.5).floor_().clamp_(least, -least - 1) * step
    error: np.ndarray = (again - grouped).square_().sum((0, 2), dtype=torch.float64).numpy()
    return error
