"""Llama 4: an expert's input is weighed, not its output, and every expert is called with every token.

    out = shared(x) + Σ_e expert_e(s_e(x) · x)        s_e = sigmoid(score) of the expert with the largest, 0 of others

An input of zeros gives zeros, so only the chosen expert is called here.  What it gives counts as it is: its share is 1.

On disk gate_up_proj is [E, H, 2I] and down_proj [E, I, H] (`LAYOUTS` in expert_names.py).
Limits: one expert a token, as all models of this family have; more would enter with another weight each.
Source: modeling_llama4.py of transformers 5.23.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from roundexport.errors import UnsupportedError
from roundexport.model.experts import Experts, gated_experts

from .interface import Mixture


class _InputsWeighed(nn.Module):
    """In place of Llama4TextMoe."""

    def __init__(self, router: nn.Linear, experts: Experts, shared: nn.Module) -> None:
        super().__init__()
        self.router, self.experts, self.shared_expert = router, experts, shared

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Output [T, H] and the router's scores [T, E]."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores = self.router(rows)
        best, chosen = torch.topk(scores, 1, dim=-1)
        entering = rows * best.float().sigmoid().to(rows.dtype)
        routed = self.experts(entering, chosen, torch.ones_like(best))
        return self.shared_expert(rows) + routed, scores


def split(module: nn.Module) -> nn.Module:
    """A module for a Llama4TextMoe."""
    of: Any = module
    if of.top_k != 1:
        raise UnsupportedError(f"Llama 4 with {of.top_k} experts a token is not supported; models of this family use 1")
    router = nn.Linear(of.router.in_features, of.router.out_features, bias=False, device="meta")
    router.weight = of.router.weight
    both, down = of.experts.gate_up_proj.detach(), of.experts.down_proj.detach()
    matrices = [(*gate_up.t().chunk(2), last.t()) for gate_up, last in zip(both, down, strict=True)]
    return _InputsWeighed(router, gated_experts(matrices, of.experts.act_fn), of.shared_expert)


MIXTURE = Mixture(stacked="Llama4TextExperts", replaced="Llama4TextMoe", split=split)
