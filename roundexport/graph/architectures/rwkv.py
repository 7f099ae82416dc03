"""RWKV-4: averages of values that older tokens fade out of, and at two places of a layer the token before.

transformers hands five states from call to call, one tensor for all layers each; here the cache of a trace takes their
place, and layers hand it what enters them.

transformers halves hidden states every few layers at inference, against float16's range, and divides output matrices in
place.  Neither is done here (model/transformers_loading.py): the model is the one that was trained, integers and scales
are those of the file's weights, and norms, which undo the halving but for their epsilon, see larger numbers.

Source: modeling_rwkv.py of transformers 5.23; Peng et al., RWKV: Reinventing RNNs for the Transformer Era (2023).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .interface import Architecture, Trace


def whole(model: Any, _: Trace, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
    """In place of RwkvForCausalLM.forward: layers are given the cache as their state."""
    return type(model).forward(model, *args, **{**kwargs, "state": past_key_values, "use_cache": False})


def attention(mixer: Any, _: Trace, hidden: Tensor, state: Any = None, **__: Any) -> tuple[Tensor, Any]:
    """In place of RwkvSelfAttention.forward."""
    before = state.shift(mixer.layer_id, hidden, "attention_shift")
    key = mixer.key(_mixed(hidden, before, mixer.time_mix_key))
    value = mixer.value(_mixed(hidden, before, mixer.time_mix_value))
    share = torch.sigmoid(mixer.receptance(_mixed(hidden, before, mixer.time_mix_receptance)))
    average = state.average(mixer.layer_id, key, value, -torch.exp(mixer.time_decay), mixer.time_first)
    return mixer.output(share * average), state


def feed_forward(mixer: Any, _: Trace, hidden: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """In place of RwkvFeedForward.forward."""
    before = state.shift(mixer.layer_id, hidden, "feed_forward_shift")
    value = mixer.value(torch.square(torch.relu(mixer.key(_mixed(hidden, before, mixer.time_mix_key)))))
    return torch.sigmoid(mixer.receptance(_mixed(hidden, before, mixer.time_mix_receptance))) * value, state


def _mixed(hidden: Tensor, before: Tensor, share: Tensor) -> Tensor:
    return hidden * share + before * (1 - share)


ARCHITECTURE = Architecture(
    {
        "RwkvForCausalLM.forward": whole,
        "RwkvSelfAttention.forward": attention,
        "RwkvFeedForward.forward": feed_forward,
    },
    whole_tables=("time_mix_key", "time_mix_value", "time_mix_receptance"),
)
