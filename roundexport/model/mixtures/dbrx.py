"""DBRX: the usual contract of experts, whose matrices lie one below the other (flat_experts.py).

Source: modeling_dbrx.py of transformers 5.23.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from roundexport.model.experts import Experts, gated_experts

from .interface import Mixture


class _Rows(nn.Module):
    """In place of DbrxFFN, whose experts are called with [B, S, H]; here with rows, as all others are."""

    def __init__(self, of: Any, experts: Experts) -> None:
        super().__init__()
        self.router, self.experts = of.router, experts
        self.top_k, self.moe_normalize_expert_weights = of.top_k, of.moe_normalize_expert_weights
        self._route = type(of).route_tokens_to_experts

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Output, as the input [B, S, H]."""
        shares, chosen = self._route(self, self.router(hidden_states))
        rows = self.experts(hidden_states.flatten(0, 1), chosen, shares)
        return rows.view_as(hidden_states)  # type: ignore[no-any-return]


def split(module: nn.Module) -> nn.Module:
    """A module for a DbrxFFN."""
    of: Any = module
    stacks = of.experts.mlp
    size = of.experts.num_experts, of.experts.ffn_hidden_size, of.experts.hidden_size
    gate, up, down = (stack.detach().view(size) for stack in (stacks.w1, stacks.v1, stacks.w2))
    return _Rows(of, gated_experts(list(zip(gate, up, down.mT, strict=True)), stacks.activation_fn))


MIXTURE = Mixture(stacked="DbrxExpertGLU", replaced="DbrxFFN", split=split)
