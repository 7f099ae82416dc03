"""Rotary embeddings in complex numbers, which no target has, as the same products of real ones.

    (a + ib) · (cos + i sin)  =  (a cos - b sin) + i (a sin + b cos)        pairs (a, b) lie side by side in a head

Some families (DeepSeek-V2) hand e^{i·angle} from their rotary module to `apply_rotary_emb`.  Both are replaced while a
model is traced: the module gives cosines and sines [B, S, D/2, 2], the function turns with them.  Only where both give
what the originals give, tried on random input, so that a family that lays its heads out otherwise stays as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from roundexport.model._patches import forwards, function_in

_FUNCTION = "apply_rotary_emb"


@contextmanager
def real_rotary(model: nn.Module) -> Iterator[None]:
    """Inside this block rotary embeddings are computed without complex numbers, where they were computed with them."""
    module = sys.modules[type(model).__module__]
    function = getattr(module, _FUNCTION, None)
    turned = [child for child in model.modules() if _is_complex(child)] if callable(function) else []
    if function is None or not turned or not _agrees(function):
        yield
        return
    with ExitStack() as opened:
        opened.enter_context(function_in(module, _FUNCTION, _turn))
        for child in turned:
            opened.enter_context(forwards([child], _angles_of(child)))
        yield


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


def _turn(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = freqs_cis[:, None, :, :, 0], freqs_cis[:, None, :, :, 1]

    def turned(x: Tensor) -> Tensor:
        a, b = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(3).type_as(x)

    return turned(xq), turned(xk)


def _agrees(function: Callable[..., Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 3, 8, generator=generator) for heads in (4, 1))
    angle = torch.randn(2, 3, 4, generator=generator)
    try:
        found = function(q, k, torch.polar(torch.ones_like(angle), angle))
    except (TypeError, ValueError, RuntimeError):
        return False
    expected = _turn(q, k, torch.stack((angle.cos(), angle.sin()), -1))
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
