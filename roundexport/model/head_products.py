"""lm_head in bfloat16 where two logits are compared: the second product is of the difference.

A loss takes the same head through two hidden states, the float model's x and the quantized model's x', which are close,
and perhaps through two weights, W and the rounded W'.  Logits of 20 rounded to bfloat16 are off by up to .06, which at
4 bits is a share of the loss.  So what is rounded is the difference:

    y  = W·x                          rounded: a float distribution a little beside the true one
    y' = y + (W' - W)·x + W'·(x' - x)        its distance to y is exact to 2^-8 of itself, and 0 where nothing differs

The gradient of y' with respect to x' is that of W'·x'.

Cost: two or three products in bfloat16 for two in float32, which take four times as long each with AVX512_BF16.
Limits: an nn.Linear without bias that is called once for each hidden state; anything else stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional

from ._patches import forwards


class NearProducts:
    """The head's products: the first of each pair is kept, the second computed from it."""

    def __init__(self, head: nn.Linear) -> None:
        self._head = head
        self._short: list[tuple[Tensor, Tensor | None, Tensor]] = []
        self._first: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states [..., H]; the calls alternate between the float model's and the other's."""
        weight = self._head.weight
        if self._first is None:
            logits = self._product(hidden, weight, None)
            self._first = (hidden.detach(), weight, logits.detach())
            return logits
        (before, plain, logits), self._first = self._first, None
        if weight is not plain:
            logits = logits + self._product(before, weight, plain)
        return logits + self._product(hidden - before, weight, None)

    def _product(self, hidden: Tensor, weight: Tensor, less: Tensor | None) -> Tensor:
        return functional.linear(hidden.bfloat16(), self._rounded(weight, less)).to(hidden.dtype)

    def _rounded(self, weight: Tensor, less: Tensor | None) -> Tensor:
        """A weight, or the difference of two, in bfloat16; made once."""
        for own, other, short in self._short:
            if own is weight and other is less:
                return short
        short = (weight if less is None else weight - less).detach().bfloat16()
        self._short.append((weight, less, short))
        return short


@contextmanager
def near_products(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model's lm_head gives pairs of logits: the float model's, then those to compare with it."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if type(head) is not nn.Linear or head.bias is not None:
        yield
        return
    with forwards([head], NearProducts(head)):
        yield
