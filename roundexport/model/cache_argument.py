"""What a model's forward calls its cache of keys and values.

    transformers   5.23               5.24 and on
    argument       past_key_values    cache          (the old name warns, and goes in 5.40)

Mamba's models call it `cache_params`.  The signature is asked, so models that kept the old name, a folder's own code
among them, are called as they want.
Source: `deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")` in transformers 5.24's modeling files.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def cache_argument(model: nn.Module, cache: object) -> dict[str, Any]:
    """The argument that gives a model's forward its cache, by the name it has there."""
    taken = inspect.signature(model.forward).parameters
    name = next((name for name in ("cache", "past_key_values", "cache_params") if name in taken), "past_key_values")
    return {name: cache}
