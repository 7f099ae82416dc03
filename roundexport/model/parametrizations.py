"""Weights that a module computes from others (weight norm): computed once, where nothing is trained any more."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize


def settle_parametrizations(model: nn.Module) -> None:
    """Give every module with parametrized weights those weights themselves, in place."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name)
