"""What transformers' own float32 loses: the same model and inputs once more in float64.

    own = max |model in float32 - model in float64| / std(model in float64)

Two ways to add the same numbers differ by rounding, and some structures make much of it: norms before small values,
exponentials of long sums, saturated attention.  A package cannot be held to more digits than the model has itself.

Modeling files ask for float32 in the middle of a forward (norms, softmax, rotary angles).  While the model runs here
every such request, made by a `dtype` or a cast, means float64, so that nothing in between is rounded.

Limits: constants that a model made in float32 when it was built, rotary frequencies among them, are taken as they are,
as both runs share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class _Float64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside it float32 means float64."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = {name: _meant(value) for name, value in (kwargs or {}).items()}
        return func(*map(_meant, args), **named)


def _meant(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """While it lasts the model computes in float64; its float32 weights are back behind it, bit by bit.

    Args:
        model: of transformers, in float32.
    """
    usual = getattr(getattr(model, "config", None), "_experts_implementation", None)
    _use_experts(model, "eager" if usual else None)  # grouped products are for narrower numbers alone
    model.double()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of tensors made of Python's numbers, which may be float64's largest
    try:
        with _Float64():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.set_default_dtype(default)
        model.float()
        _use_experts(model, usual)


def widened(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs with their floats as float64."""
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def _use_experts(model: Any, implementation: str | None) -> None:
    if implementation is not None:
        model.set_experts_implementation(implementation)
