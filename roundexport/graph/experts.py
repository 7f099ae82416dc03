"""Mixtures of experts in a captured graph: tokens sorted by expert, one placeholder for all experts' products.

    roundexport::grouped_linear(x, counts, index, out_features)     y [S, N]; index into Capture.groups
        x [S, K] sorted by expert; counts [E] rows of each, which add up to S.  A group lists for every expert the
        linears that read its rows, whose outputs stand side by side: [[gate, up], [gate, up], …] or [[down], [down], …]

The rest is plain operators: sort the T·k choices by expert, take each one's token, multiply, activate, multiply, weigh,
put back in order and add up k rows for each token.  No expert that was not chosen has rows, so that a runtime reads its
weights only when they are needed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from roundexport.model.expert_names import DOWN
from roundexport.model.experts import Expert, Experts
from roundexport.quant.spec import LinearInfo

from .placeholders import Swaps, define

define(
    "grouped_linear(Tensor x, Tensor counts, int index, int out_features) -> Tensor",
    lambda x, counts, index, out_features: x.new_empty(x.shape[0], out_features),
)


class _SortedExperts(nn.Module):
    """Stand-in for the experts of one layer."""

    def __init__(self, example: Expert, count: int, groups: tuple[int, int], widths: tuple[int, int]) -> None:
        super().__init__()
        self._activate, self._parts = example.activate, len(example.entries)
        self._count, self._groups, self._widths = count, groups, widths

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        tokens, width = top_k_index.shape
        flat = top_k_index.reshape(-1)
        order = torch.argsort(flat)
        counts = (flat[None] == torch.arange(self._count)[:, None]).sum(1)
        rows = hidden_states[order // width]
        entering = self._product(rows, counts, 0)
        out = self._product(self._activate(entering.chunk(self._parts, -1)), counts, 1)
        out = out[torch.argsort(order)].reshape(tokens, width, self._widths[1])
        return (out * top_k_weights[..., None]).sum(1)

    def _product(self, x: Tensor, counts: Tensor, place: int) -> Tensor:
        found: Tensor = torch.ops.roundexport.grouped_linear(x, counts, self._groups[place], self._widths[place])
        return found


def swap_experts(model: nn.Module, swaps: Swaps) -> None:
    """Replace the experts of every layer by the placeholder; to be called before other linears are replaced."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, Experts):
            continue
        experts = list(module.experts())
        first = experts[0].entries
        groups, widths = [], []
        for parts in (first, (DOWN,)):
            members = [
                [_note(swaps, f"{name}.{number}.{part}", expert.get_submodule(part)) for part in parts]
                for number, expert in enumerate(experts)
            ]
            widths.append(sum(swaps.linears[index].out_features for index in members[0]))
            groups.append(len(swaps.groups))
            swaps.groups.append(tuple(map(tuple, members)))
        stand_in = _SortedExperts(experts[0], len(experts), (groups[0], groups[1]), (widths[0], widths[1]))
        model.set_submodule(name, stand_in)


def _note(swaps: Swaps, name: str, linear: nn.Module) -> int:
    """Enter a linear into the tables of placeholders; returns its index."""
    rows, width = linear.get_parameter("weight").shape
    if getattr(linear, "bias", None) is not None:
        swaps.biased.add(name)
    swaps.linears.append(LinearInfo(name, width, rows))
    return len(swaps.linears) - 1
