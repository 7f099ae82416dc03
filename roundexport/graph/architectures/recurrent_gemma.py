"""RecurrentGemma: a gated recurrence of every channel by itself, and a short convolution, both kept in the layer.

    h_t = a_t · h_(t-1) + x_t · i_t · sqrt(1 - a_t²)      a_t = e^(-8 · r_t · softplus(p)),  0 at a row's first token

That is linear attention with a head of one value for every channel, and keys and queries of 1.  The gates i and r are
made by a matrix per head, [heads, width, width], which stay float: they are small, and are multiplied without a linear.

transformers keeps both states as attributes of the layer; here it hands what enters them to the cache of a trace.
Source: modeling_recurrent_gemma.py of transformers 5.23; De et al., Griffin (2024).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .interface import Architecture, Trace

_FORGOTTEN = -1e4  # whose exponential is 0


def whole(model: Any, _: Trace, *args: Any, **kwargs: Any) -> Any:
    """In place of RecurrentGemmaModel.forward: layers do not know their numbers."""
    for number, layer in enumerate(model.layers):
        layer.temporal_block.number = number
    return type(model).forward(model, *args, **kwargs)


def forward(
    block: Any,
    _: Trace,
    input_states: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None = None,
    use_cache: bool = True,
    past_key_values: Any = None,
    **__: Any,
) -> tuple[Tensor, None]:
    """In place of RecurrentGemmaRecurrentBlock.forward."""
    x = block.linear_x(input_states)
    if attention_mask is not None:
        x = torch.ops.roundexport.tokens_only(x, attention_mask)
    weight, bias = block.conv_1d.weight.squeeze(1), block.conv_1d.bias
    x = past_key_values.convolve(block.number, x.transpose(1, 2), weight, bias).transpose(1, 2)
    entering, decay = _gated(block.rg_lru, x, position_ids)
    one = torch.ones_like(x[:, :, :1, None])
    found = past_key_values.attend(block.number, one, one, entering[..., None], decay[..., None])
    return block.linear_out(found.squeeze(-1) * block.act_fn(block.linear_y(input_states))), None


def _gated(unit: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What enters the state, and the logarithm of what is left of it, [B, S, channels]."""
    heads = x.reshape(*x.shape[:2], unit.num_attention_heads, 1, unit.block_width)
    first = (position_ids == 0)[..., None]
    inner, outer = (
        torch.sigmoid(torch.matmul(heads, weight).squeeze(-2) + bias).flatten(-2)
        for weight, bias in (
            (unit.input_gate_weight, unit.input_gate_bias),
            (unit.recurrent_gate_weight, unit.recurrent_gate_bias),
        )
    )
    decay = -8.0 * outer * functional.softplus(unit.recurrent_param)
    share = torch.where(first, 1.0, torch.sqrt(1.0 - torch.exp(2.0 * decay)))
    return x * inner * share, torch.where(first, _FORGOTTEN, decay)


ARCHITECTURE = Architecture(
    {"RecurrentGemmaModel.forward": whole, "RecurrentGemmaRecurrentBlock.forward": forward},
    whole_tables=("input_gate_weight", "recurrent_gate_weight"),
    asks=True,
)
