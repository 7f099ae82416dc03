"""Rotary embeddings in complex numbers, which no target has, as the placeholder for real ones.

    (a + ib) · (cos + i sin)  =  (a cos - b sin) + i (a sin + b cos)        pairs (a, b) lie side by side in a head

Some families (DeepSeek-V2, Llama 4) hand e^{i·angle} from their rotary module to `apply_rotary_emb`.  Both are replaced
while a model is traced: the module gives cosines and sines [B, S, D/2, 2], the function turns with them.  Only where
both give what the originals give, tried on random input, so that a family that turns otherwise stays as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from roundexport.model._patches import forwards, function_in

from .rotary import Rotary, formula

_FUNCTION = "apply_rotary_emb"


@contextmanager
def real_rotary(model: nn.Module, rotary: Rotary) -> Iterator[None]:
    """Inside this block rotary embeddings are turned without complex numbers, where they were turned with them.

    Args:
        model: the model.
        rotary: turns by the placeholder.
    """
    module = sys.modules[type(model).__module__]
    function = getattr(module, _FUNCTION, None)
    turned = [child for child in model.modules() if _is_complex(child)] if callable(function) else []
    axis = _heads_axis(function) if function is not None and turned else None
    if axis is None:
        yield
        return

    def turn(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = rotary.once(freqs_cis, "cos", _real), rotary.once(freqs_cis, "sin", _imaginary)
        return rotary.turn(xq, cos, sin, True, axis), rotary.turn(xk, cos, sin, True, axis)

    with ExitStack() as opened:
        opened.enter_context(function_in(module, _FUNCTION, turn))
        for child in turned:
            opened.enter_context(forwards([child], _angles_of(child)))
        yield


def _real(pairs: Tensor) -> Tensor:
    return pairs[..., 0]


def _imaginary(pairs: Tensor) -> Tensor:
    return pairs[..., 1]


def _is_complex(module: nn.Module) -> bool:
    """Whether a module gives e^{i·angle} for positions, with angles that its frequencies say."""
    of: Any = module
    if not isinstance(getattr(of, "inv_freq", None), Tensor) or not hasattr(of, "attention_scaling"):
        return False
    x, positions = torch.zeros(1, 3, 4), torch.tensor([[0, 1, 7]])
    try:
        found = of(x, positions)
    except (TypeError, ValueError, RuntimeError):
        return False
    if not isinstance(found, Tensor) or not found.is_complex():
        return False
    return torch.allclose(torch.view_as_real(found), _angles_of(module)(x, positions), atol=1e-6)


def _angles_of(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    of: Any = module

    def angles(x: Tensor, position_ids: Tensor) -> Tensor:
        angle: Tensor = position_ids[..., None].float() * of.inv_freq
        return torch.stack((angle.cos(), angle.sin()), -1) * float(of.attention_scaling)

    return angles


def _heads_axis(function: Callable[..., Any]) -> int | None:
    """The axis of heads in what a function turns, 1 or 2; None where it does something else."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.randn(2, 3, 4, generator=generator)
    tensors = [torch.randn(2, heads, 3, 8, generator=generator) for heads in (4, 1)]
    expected = [formula(x, angle.cos(), angle.sin(), True) for x in tensors]
    for axis in (1, 2):
        q, k = tensors if axis == 1 else (x.transpose(1, 2) for x in tensors)
        try:
            found = function(q, k, torch.polar(torch.ones_like(angle), angle))
        except (TypeError, ValueError, RuntimeError):
            continue
        found = found if axis == 1 else [x.transpose(1, 2) for x in found]
        if all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True)):
            return axis
    return None
