"""From last hidden states to the model's output: the model's own forward, with blocks that hand these on.

Norms, scales, soft caps and lm_head after the blocks are whatever the model has there, without any per-model code: its
blocks' forwards are exchanged while the context is open, so that the last one "returns" the hidden states in question.

Limits: one user at a time, as the blocks are the model's own; a backward pass that runs blocks again (checkpointing)
must happen outside the context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from roundexport.types import VECTORS

from ._patches import forwards
from .block_call import BlockCall, without_cache
from .blocks import Stack
from .hooks import hooks
from .main_input import named

OutputOf = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]


def output_tensor(output: Any, vector: bool = False) -> Tensor:
    """What a model of any task gives: the logits of its head, or last hidden states where it has none; float32.

    Args:
        output: what its forward returned.
        vector: the vector is wanted that a model of images makes itself.
    """
    return told_tensor(output, vector).float()


def told_tensor(output: Any, vector: bool = False) -> Tensor:
    """The same in the type that the model computes in."""
    if "start_logits" in output:
        return torch.stack([output["start_logits"], output["end_logits"]], -1)
    names = VECTORS if vector else ("logits", "last_hidden_state")
    found: Tensor = output[next(name for name in names if name in output)]
    return found


@contextmanager
def output_of(model: nn.Module, stack: Stack, rest: tuple[Any, ...] | None) -> Iterator[OutputOf]:
    """What takes last hidden states to the model's output.

    Args:
        model: the model.
        stack: its blocks.
        rest: what a block returns beside hidden states, see :func:`returned_beside`; None where it returns a tensor.

    Yields:
        A function of hidden states [n, S, H], token ids [n, S] and parameters to use by name, which gives the
        logits of the model's head, [n, S, V] of a decoder, or an encoder's last hidden states.
    """
    current = [torch.empty(0)]
    no_cache = without_cache(model)

    def instead(*_: Any, **__: Any) -> Any:
        return current[0] if rest is None else (current[0], *rest)

    def run(hidden: Tensor, ids: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        current[0] = hidden
        kwargs: dict[str, Any] = {**named(model, ids.to(hidden.device)), **no_cache}
        output = torch.func.functional_call(model, dict(parameters), (), kwargs)
        return output_tensor(output)

    with forwards(stack.blocks, instead):
        yield run


def returned_beside(block: nn.Module, call: BlockCall, hidden: Tensor) -> tuple[Any, ...] | None:
    """What a block returns beside hidden states; None where it returns these alone.

    Args:
        block: the block.
        call: how it is called.
        hidden: any hidden states [1, S, H].
    """
    found: list[Any] = []
    handle = block.register_forward_hook(lambda _, __, output: found.append(output))
    with hooks([handle]), torch.no_grad():
        call.run(block, hidden)
    return found[0][1:] if isinstance(found[0], tuple) else None
