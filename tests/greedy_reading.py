"""Greedy text is checked by reading it once, and not by writing it a second time.

Where each token that was written is the likeliest behind those before it, a model that recomputes everything at each
step writes the same text, token by token.  Reading takes one pass over the text instead of one for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch


def likeliest(
    logits_of: Callable[[list[list[int]]], Any], prompt: list[int], written: list[int], never: Sequence[int] = ()
) -> list[int]:
    """The likeliest token in the place of each that was written.

    Args:
        logits_of: logits [1, S, V] of token ids [1, S], of numpy or torch.
        prompt: what stands before the text.
        written: the text.
        never: tokens that are not chosen.
    """
    logits = np.asarray(logits_of([prompt + written])[0, len(prompt) - 1 : -1]).copy()
    logits[:, list(never)] = -np.inf
    found: list[int] = logits.argmax(-1).tolist()
    return found


def reader(model: torch.nn.Module) -> Callable[[list[list[int]]], torch.Tensor]:
    """``logits_of`` of a model of transformers."""

    @torch.no_grad()
    def logits(ids: list[list[int]]) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=torch.tensor(ids)).logits
        return found

    return logits
