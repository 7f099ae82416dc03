"""How a transformers model goes on behind its last call: with a cache it fills, or with a state that the call gave.

    most families    a cache, which every call is given again         RWKV    ``state``, which the next call is given

RWKV of transformers 5.23 mixes the rows of a batch wherever a call has one token: to hidden states [B, 1, H] it adds
what it knows of the token before as [B, H].  Here that is read with the axis it lacks.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from .cache_argument import cache_argument

if TYPE_CHECKING:
    from torch import Tensor, nn

_STATE, _SHIFTS, _ALL = "state", 2, 5
_LOWEST = -1e30  # the largest exponent of nothing


class _TokenBefore:
    """What all layers know of the token before, [B, H, layers], read as [B, 1, H] of one layer."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def __getitem__(self, place: Any) -> Tensor:
        return self._values[place].unsqueeze(1)

    def __setitem__(self, place: Any, value: Tensor) -> None:
        self._values[place] = value


def to_go_on(model: nn.Module, cache: object, ids: Tensor, told: Any = None) -> dict[str, Any]:
    """The argument with which a model's forward goes on behind its last call.

    Args:
        model: the model.
        cache: one for all calls, empty before the first.
        ids: token ids of this call, [B, S].
        told: what the last call gave; None: this is the first.
    """
    if _STATE not in inspect.signature(model.forward).parameters:
        return cache_argument(model, cache)
    if told is None and ids.shape[1] > 1:
        return {}
    state = _empty(model, ids) if told is None else getattr(told, _STATE)
    shifts = [one if isinstance(one, _TokenBefore) else _TokenBefore(one) for one in state[:_SHIFTS]]
    return {_STATE: [*shifts, *state[_SHIFTS:]]}


def _empty(model: Any, ids: Tensor) -> list[Tensor]:
    import torch

    shape = len(ids), model.config.hidden_size, model.config.num_hidden_layers
    state = [torch.zeros(shape, device=ids.device) for _ in range(_ALL)]
    state[-1] += _LOWEST
    return state
