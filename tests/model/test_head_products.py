"""lm_head in bfloat16: a pair's distance is exact where its logits are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from roundexport.model.head_products import near_products


class Model(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lm_head = nn.Linear(64, 96, bias)
        self.lm_head.weight.data.mul_(20)  # logits of 10 to 30, where bfloat16 has steps of .06 and .13

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.lm_head(hidden)
        return found


def pair(swapped: bool) -> tuple[Model, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    model = Model().requires_grad_(False)
    hidden = torch.randn(1, 7, 64)
    near = hidden + 0.01 * torch.randn(1, 7, 64)
    weight = model.lm_head.weight + 0.01 * torch.randn(96, 64)
    return model, hidden, near, {"lm_head.weight": weight} if swapped else {}


@pytest.mark.parametrize("swapped", [False, True], ids=["one weight", "rounded weight"])
def test_the_difference_of_logits_is_exact_and_so_is_its_gradient(swapped: bool) -> None:
    model, hidden, near, other = pair(swapped)
    run = torch.func.functional_call
    expected = run(model, other, (near,)) - model(hidden)
    gradient = torch.randn(1, 7, 96)
    weight = other.get("lm_head.weight", model.lm_head.weight)
    with near_products(model):
        for _ in range(2):  # pairs do not mix
            first = model(hidden)
            inner = near.clone().requires_grad_()
            found = run(model, other, (inner,))
            own = torch.autograd.grad(found, inner, gradient)[0]
    assert (first - model(hidden)).abs().max() > 0.01  # as rounded logits are
    assert (found.detach() - first - expected).abs().max() < 0.01 * expected.abs().max()
    torch.testing.assert_close(own, gradient @ weight, rtol=0.02, atol=0.1)
    assert "forward" not in vars(model.lm_head)


def test_nothing_differs_where_nothing_does() -> None:
    model, hidden, _, _ = pair(False)
    with near_products(model):
        assert torch.equal(model(hidden), model(hidden.clone()))


def test_another_head_stays_as_it_is() -> None:
    model, hidden = Model(bias=True), torch.randn(1, 7, 64)
    expected = model(hidden)
    with near_products(model):
        assert torch.equal(model(hidden), expected)
