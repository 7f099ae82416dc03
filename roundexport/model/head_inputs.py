"""What enters lm_head in the float model: hidden states behind the last norm, one batch at a time.

    H = Σ xᵀx   [K, K]      over the positions that count, in float32

In: the float model, token ids, a mask.  Out: H.  Cost: a forward of the samples without lm_head, whose product is never
computed; each batch reads every block once.  Limits: a model that does not call its head as a module is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from roundexport.errors import UnsupportedError

from .bf16_linears import bfloat16_products
from .block_call import without_cache
from .hooks import hooks
from .main_input import named
from .streamed_model import StreamedModel


def head_gram(
    weights: StreamedModel,
    ids: Tensor,
    mask: Tensor,
    batch_size: int,
    done: Callable[[float], None] = lambda share: None,
) -> Tensor:
    """H of what enters a decoder's lm_head, [K, K].

    Args:
        weights: the float model.
        ids: token ids [n, S].
        mask: 1 for positions that count, [n, S].
        batch_size: samples at a time.
        done: takes the share of the samples that is done.

    Raises:
        UnsupportedError: lm_head is not called as a module.
    """
    head: Any = weights.model.get_output_embeddings()  # type: ignore[operator]
    distinct = weights.distinct(ids)
    total: Tensor | None = None
    with ExitStack() as opened:
        opened.enter_context(torch.no_grad())
        opened.enter_context(weights.embedding(distinct, weights.token_rows(distinct)))
        model = opened.enter_context(weights.streamed_forward())
        for block in weights.stack.blocks if weights.bfloat16 else ():
            opened.enter_context(bfloat16_products(block))
        entering = opened.enter_context(stopped_at(head))
        for start in range(0, len(ids), batch_size):
            part = slice(start, start + batch_size)
            with suppress(HeadReachedError):
                model(**named(model, ids[part]), **without_cache(model))
            rows = (entered(entering).float().cpu() * mask[part, :, None]).flatten(0, 1)
            total = rows.t() @ rows if total is None else total.addmm_(rows.t(), rows)
            done(min(1.0, (start + batch_size) / len(ids)))
    assert total is not None, "at least one sample"
    return total


class HeadReachedError(Exception):
    """Ends a model's forward where its head would begin."""


@contextmanager
def stopped_at(head: nn.Module) -> Iterator[list[Tensor]]:
    """While it lasts, a forward raises HeadReachedError where the head would begin; what would enter it is listed."""
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise HeadReachedError

    with hooks([head.register_forward_pre_hook(stop)]):
        yield found


def entered(found: list[Tensor]) -> Tensor:
    """Take what the last forward listed.

    Raises:
        UnsupportedError: nothing: the model does not call its head as a module.
    """
    if not found:
        raise UnsupportedError(
            "lm_head is not called as a module, so what enters it is not known; take --embedding-bits 8"
        )
    return found.pop()
