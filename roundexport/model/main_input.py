"""What goes into a model: token ids, whose rows an embedding looks up, or pixels, which nothing looks up.

transformers names the argument (`main_input_name`).  Whoever runs a model on samples passes them under that name, and
asks for the token embedding here, so that pixels need no code of their own on the way through a tuning run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from roundexport.types import input_of

if TYPE_CHECKING:
    from torch import Tensor, nn

_IDS = input_of("generate")


def main_input(model: nn.Module) -> str:
    """Name of the argument that holds the samples."""
    return str(getattr(model, "main_input_name", _IDS))


def named(model: nn.Module, samples: Tensor) -> dict[str, Tensor]:
    """Samples as an argument of the model's forward."""
    return {main_input(model): samples}


def token_table(model: nn.Module) -> Any:
    """The module that looks token ids up; None where the model does not take any."""
    return model.get_input_embeddings() if main_input(model) == _IDS else None  # type: ignore[operator]
