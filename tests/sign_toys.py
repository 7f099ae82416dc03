"""What the tests of the sign-step methods share: a block small enough to follow, its hidden states, and its loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from roundexport.algorithms.interface import BlockInputs
from roundexport.model.block_call import BlockCall
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec


class Block(nn.Module):
    """A residual block with two linears and a frozen norm; always the same weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.requires_grad_(False).eval()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.down(nn.functional.silu(self.up(self.norm(hidden_states))))


def inputs_of(block: Block) -> BlockInputs:
    """12 samples of 8 positions, of which the last does not count; the quantized prefix is off by 2 %."""
    generator = torch.Generator().manual_seed(1)
    floats = torch.randn(12, 8, 32, generator=generator)
    quantized = floats + 0.02 * torch.randn(floats.shape, generator=generator)
    mask = torch.ones(12, 8)
    mask[:, -1] = 0
    return BlockInputs(BlockCall((), {}, False), quantized, floats, block(floats), mask, seed=3)


def specs(bits: int, symmetric: bool) -> dict[str, QuantSpec]:
    return {name: QuantSpec(bits, 16, symmetric) for name in ("up", "down")}


def loss_of(block: Block, inputs: BlockInputs, layers: Mapping[str, QuantizedLinear]) -> float:
    """Squared error of the block's output with these integers, over the positions that count."""
    weights = {name: torch.from_numpy(linear.dequantize()) for name, linear in layers.items()}
    error = inputs.call.run(block, inputs.quantized_inputs, weights) - inputs.target
    return float(error[:, :-1].square().mean())
