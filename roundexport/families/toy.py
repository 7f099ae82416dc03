"""A family's model with random weights that eight bits hold exactly, written as a model folder.

    w = c · 2^-step,  c a random whole number from -127 to 127, and -128 wherever (row + column) mod 16 is 0

A group of weights along a row or a column that is at least 16 long has a -128 in it, which is its largest; rounding to
nearest in 8 bits then takes 2^-step for the scale and finds every c again.  So the tuned package must give what
`from_pretrained` gives for this very folder, and nothing of this project stands between the two.

step is 8, the standard deviation .28: logits are far from flat.  Structures that saturate get less.  What is not a
linear, an embedding or a stack of experts (convolutions, states) is scaled to .25; norms and biases are moved away from
one and zero, so that a lost one is seen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from roundexport.errors import UnsupportedError
from roundexport.model.mixtures.interface import holds_stack

from .configurations import Family

LEAST, APART = -128, 16
_POOLING = "1_Pooling"


def write_model(family: Family, folder: Path) -> None:
    """Build a family's model and save it.

    Args:
        family: which.
        folder: to make.

    Raises:
        UnsupportedError: transformers, as it is installed, does not have it or cannot build it.
    """
    import transformers

    config_class = getattr(transformers, family.config, None)
    model_class = getattr(transformers, family.model, None)
    if config_class is None or model_class is None:
        raise UnsupportedError(f"transformers {transformers.__version__} has no {family.model}")
    torch.manual_seed(0)
    model = model_class(config_class(**family.values)).eval()
    spread(model, 2.0**-family.step)
    model.save_pretrained(folder)
    if family.pooling is not None:
        _write_modules(folder, family.pooling)


@torch.no_grad()
def spread(model: nn.Module, step: float) -> None:
    """Give a model weights as described above, in place; tied weights once."""
    seen: set[int] = set()
    for module in model.modules():
        exact = isinstance(module, nn.Linear | nn.Embedding | Conv1D)
        exact |= holds_stack(module)
        convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif exact or (parameter.ndim == 3 and not convolution):
                parameter.copy_(_on_the_grid(parameter.shape, step))
            elif parameter.std() > 0:
                parameter.mul_(0.25 / parameter.std())
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0


def _on_the_grid(shape: torch.Size, step: float) -> Tensor:
    codes = torch.randint(-127, 128, tuple(shape)).float()
    rows, columns = (torch.arange(size) for size in shape[-2:])
    codes[..., (rows[:, None] + columns) % APART == 0] = LEAST
    return codes * step


def _write_modules(folder: Path, pooling: str) -> None:
    """The files of sentence-transformers: a model, then its pooling."""
    kinds: list[dict[str, Any]] = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": _POOLING, "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(kinds), encoding="utf-8")
    (folder / _POOLING).mkdir()
    (folder / _POOLING / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}), encoding="utf-8")
