"""bfloat16 products while tuning: linears and attention in the format that newer processors multiply fastest.

    y = float32(bfloat16(x) · bfloat16(W)ᵀ) + b        summed in float32 by the processor, rounded to bfloat16 once
    a = float32(attention(bfloat16(q), bfloat16(k), bfloat16(v)))           likewise, inside torch's own attention

Only these products are so computed, which are most of a block's time.  Hidden states, norms, biases, Gram sums, scales
and codes stay float32: a linear is given float32 and gives float32, so no method knows the difference.  It becomes one
of another class for as long as its block is worked on; parameters, hooks and names stay.  Attention is exchanged where
transformers looks it up, in the block's configuration.

Gain: AVX512_BF16 does twice the products of float32 per instruction, AMX sixteen times.  Without either, bfloat16 is
emulated and slower.  Loss of accuracy: see DECISIONS.md.  Limits: classes derived from nn.Linear keep float32, as their
forward may be another one; so does attention other than "sdpa".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from .blocks import linears

_FLOAT32, _BFLOAT16 = "sdpa", "roundexport_bfloat16"  # names of attentions


def in_hardware(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 faster than float32."""
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "xpu" and bool(torch.xpu.is_bf16_supported(including_emulation=False))


@contextmanager
def bfloat16_products(block: nn.Module) -> Iterator[None]:
    """While it lasts, the block's linears and attention multiply in bfloat16."""
    with _as(block, _LOWERED), _attending(block, _FLOAT32, _BFLOAT16):
        yield


@contextmanager
def float32_products(block: nn.Module) -> Iterator[None]:
    """While it lasts, they multiply in float32 whatever was chosen: where equality to rounding error is looked for."""
    with _as(block, {lowered: own for own, lowered in _LOWERED.items()}), _attending(block, _BFLOAT16, _FLOAT32):
        yield


@contextmanager
def _as(block: nn.Module, others: dict[type[nn.Module], type[nn.Module]]) -> Iterator[None]:
    """Modules of one class are of another, which differs in its forward alone."""
    changed = [(module, type(module)) for module in linears(block).values() if type(module) in others]
    try:
        for module, own in changed:
            module.__class__ = others[own]
        yield
    finally:
        for module, own in changed:
            module.__class__ = own


@contextmanager
def _attending(block: nn.Module, before: str, name: str) -> Iterator[None]:
    """Modules whose attention is the one of that name have another."""
    found: list[Any] = [module.config for module in block.modules() if hasattr(module, "config")]
    changed = [config for config in found if getattr(config, "_attn_implementation", None) == before]
    try:
        for config in changed:
            config._attn_implementation = name
        yield
    finally:
        for config in changed:
            config._attn_implementation = before


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As `sdpa_attention_forward`: query [B, heads, S, D], key and value [B, kv heads, S, D] to [B, S, heads, D]."""
    if attention_mask is not None and attention_mask.is_floating_point():
        # The least float32 is beyond bfloat16: it would be -inf, and a row of them gives NaN.
        attention_mask = attention_mask.clamp(min=torch.finfo(torch.bfloat16).min).bfloat16()
    lowered = query.bfloat16(), key.bfloat16(), value.bfloat16()
    out, _ = sdpa_attention_forward(module, *lowered, attention_mask, **options)
    return out.to(query.dtype), None


AttentionInterface.register(_BFLOAT16, _attention)
AttentionMaskInterface.register(_BFLOAT16, sdpa_mask)


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
