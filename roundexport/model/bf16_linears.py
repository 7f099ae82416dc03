"""bfloat16 products while tuning: a block's linears in the format that newer processors multiply fastest.

    y = float32(bfloat16(x) · bfloat16(W)ᵀ) + b        summed in float32 by the processor, rounded to bfloat16 once

Only the products of linears are so computed, which are most of a block's time.  Hidden states, norms, attention,
biases, Gram sums, scales and codes stay float32: a linear is given float32 and gives float32, so no method knows the
difference.  It becomes one of another class for as long as its block is worked on; parameters, hooks and names stay.

Gain: AVX512_BF16 does twice the products of float32 per instruction, AMX sixteen times.  Without either, bfloat16 is
emulated and slower.  Loss of accuracy: see docs/lab-notes.md.
Limits: classes derived from nn.Linear keep float32, as their forward may be another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from roundexport.kernels._processor import short_products

from ._patches import classes
from .blocks import linears


def in_hardware(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 faster than float32."""
    if device.type == "cpu":
        return bool(short_products() & {"avx512_bf16", "amx_bf16"})
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "xpu" and bool(torch.xpu.is_bf16_supported(including_emulation=False))


@contextmanager
def bfloat16_products(block: nn.Module) -> Iterator[None]:
    """While it lasts, the block's linears multiply in bfloat16."""
    with classes(linears(block).values(), _LOWERED):
        yield


@contextmanager
def float32_products(block: nn.Module) -> Iterator[None]:
    """While it lasts, they multiply in float32 whatever was chosen: where equality to rounding error is looked for."""
    with classes(linears(block).values(), {lowered: own for own, lowered in _LOWERED.items()}):
        yield


class _Bfloat16Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return _product(input, self.weight, self.bias)


class _Bfloat16Conv1D(Conv1D):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        return _product(x, self.weight.t(), self.bias)


_LOWERED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _Bfloat16Linear, Conv1D: _Bfloat16Conv1D}


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = functional.linear(hidden.bfloat16(), weight.bfloat16()).to(hidden.dtype)
    return out if bias is None else out + bias
