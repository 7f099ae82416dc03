"""Weights rounded for the sums H of their inputs, as `gram` does it and with a third of its work, to be scored.

In: H [K, K], a weight [N, K], a scheme.  Out: the rounded weight.  Above 4 bits nearest codes do: nothing is lost there
that a better rounding could win.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from roundexport.errors import RoundexportError
from roundexport.kernels import cholesky, gram_rounding, round_to_nearest
from roundexport.quant.spec import QuantSpec

_DAMPING = 0.3  # of H, as `gram` has it
_EFFORT = gram_rounding.Effort(
    sweeps=2, searches=0, keep_size=True
)  # a third of the time of the recipes', for scores alike
_GAINING_BITS = 4


class GramSpace:
    """Rounds weights that share their inputs.

    Args:
        gram: H; damped in place.
        where: who reads the inputs, for the error.

    Raises:
        RoundexportError: inputs are not finite.
    """

    def __init__(self, gram: Tensor, where: str) -> None:
        if not bool(torch.isfinite(gram.diagonal()).all()):
            raise RoundexportError(f"activations that enter {where} are not finite; the model is unusable")
        gram.diagonal().add_(gram_rounding.usual_share(gram, _DAMPING))
        self._gram, self._factor = gram, cholesky.inverse_factor(gram)

    def rounded(self, weight: Tensor, spec: QuantSpec) -> Tensor:
        """Rows [n, K] of a weight as they become."""
        if spec.bits > _GAINING_BITS:
            return nearest(weight, spec)
        return gram_rounding.run(weight, spec, self._gram, _EFFORT, self._factor).weight()


def nearest(weight: Tensor, spec: QuantSpec) -> Tensor:
    """A weight with nearest codes."""
    return torch.from_numpy(round_to_nearest.run(weight, spec).dequantize()).to(weight.device)


def constants() -> dict[str, Any]:
    """What decides a rounding beside H and the scheme, as JSON values."""
    return {"damping": _DAMPING, "effort": dataclasses.asdict(_EFFORT), "gaining_bits": _GAINING_BITS}
