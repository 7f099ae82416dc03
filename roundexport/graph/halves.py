"""The two halves of a model with an encoder and a decoder, as programs of their own.

    encoder   input_ids, attention_mask [B, E]  or  input_features [B, mels, frames]   ──▶ last_hidden_state [B, E, H]
    decoder   input_ids [B, S], past [P], encoder_attention_mask [B, E] of texts       ──▶ logits [B, S, V]
              and what the encoder gave, in one of two ways:

    ``cross`` False   the decoder gets ``encoder_hidden_states`` [B, E, H] and makes keys and values of its
                      cross-attention from it (a state of the graph then keeps them)
    ``cross`` True    the encoder's program goes on to those keys and values, one pair per decoder layer,
                      ``present.<i>.encoder.key|value`` [B, heads, E, D], and the decoder's gets them as
                      ``past_key_values.<i>.encoder.key|value``

Nothing is known of a family here: the cache that transformers hands to every layer is ours, and it is through the cache
that keys and values of cross-attention pass.  Its length is that of ``past``, a tensor of which nothing but the
length counts; a target puts the length of its own cache in its place.

Rows of the decoder have one length and no padding: answers begin together and beams grow together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from roundexport.errors import UnsupportedError
from roundexport.model.cache_argument import cache_argument

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .attention import AttentionTrace

SPEECH = "input_features"
PAST, STATES, MASK = "past", "encoder_hidden_states", "encoder_attention_mask"
GIVEN, MADE = "past_key_values.{}.encoder.{}", "present.{}.encoder.{}"
PARTS = ("key", "value")
_BATCH, _NEW, _LENGTH, _SOURCE = 2, 5, 7, 11  # of samples; all different, so that no two axes are taken for one
_ANY = torch.export.Dim.DYNAMIC


@dataclass(frozen=True)
class Half:
    """Which half is captured, and how what the encoder gives reaches the decoder; see above."""

    name: Literal["encoder", "decoder"]
    cross: bool


@dataclass(frozen=True, eq=False)
class Traced:
    """A module ready for `torch.export`.

    Args:
        module: what is traced.
        samples: its arguments by name.
        dynamic: which of their axes are dynamic, by name.
        inputs: names of the graph's inputs, in order.
        outputs: names of its outputs, in order.
    """

    module: nn.Module
    samples: dict[str, Any]
    dynamic: dict[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class _Past(DynamicCache):  # type: ignore[misc]
    """A decoder's cache of which only the length is known; it hands new keys and values through."""

    def __init__(self, config: Any, length: int) -> None:
        super().__init__(config=config)
        self._length = length

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key, value

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return self._length


class _Cross(DynamicCache):  # type: ignore[misc]
    """Keys and values of cross-attention: noted as they are made, and exchanged for given ones."""

    def __init__(self, config: Any, trace: AttentionTrace, given: list[Tensor] | None) -> None:
        super().__init__(config=config)
        self._trace, self._given = trace, given
        self.made: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.made[layer] = key, value
        if self._given is not None:
            key, value = self._given[2 * layer : 2 * layer + 2]
        self._trace.cross[id(key)] = key, layer
        return key, value

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return 0


class _Pair(nn.Module):
    """What both halves have in common."""

    def __init__(self, model: nn.Module, trace: AttentionTrace) -> None:
        super().__init__()
        self.model, self.trace = model, trace

    def decode(
        self, ids: Tensor, states: Tensor, mask: Tensor | None, length: int, given: list[Tensor] | None
    ) -> tuple[Tensor, _Cross]:
        """Logits, and what passed through the cache of cross-attention."""
        self.trace.decoder = True
        config = self.model.config
        cross = _Cross(config, self.trace, given)
        cache = EncoderDecoderCache(_Past(config, length), cross)
        out = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask,
            decoder_input_ids=ids,
            decoder_attention_mask=ids.new_ones(ids.shape[0], length + ids.shape[1]),
            use_cache=True,
            **cache_argument(self.model, cache),
        )
        return out.logits, cross


class _Encoder(_Pair):
    def __init__(self, model: nn.Module, trace: AttentionTrace, cross: bool) -> None:
        super().__init__(model, trace)
        self.cross = cross

    def forward(self, **inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        self.trace.start()
        self.trace.decoder = False
        states: Tensor = self.model.get_encoder()(**inputs).last_hidden_state  # type: ignore[operator]
        if not self.cross:
            return states
        first = torch.zeros(states.shape[0], 1, dtype=torch.long)
        _, passed = self.decode(first, states, inputs.get("attention_mask"), 0, None)
        return (states, *(part for layer in sorted(passed.made) for part in passed.made[layer]))


class _TextEncoder(_Encoder):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        return super().forward(input_ids=input_ids, attention_mask=attention_mask)


class _SpeechEncoder(_Encoder):
    def forward(self, input_features: Tensor) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        return super().forward(input_features=input_features)


class _Decoder(_Pair):
    def forward(
        self,
        input_ids: Tensor,
        past: Tensor,
        encoder_attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        given: list[Tensor] | None = None,
    ) -> Tensor:
        self.trace.start()
        states = encoder_hidden_states
        if states is None:
            assert given is not None
            source = given[0]
            states = source.new_zeros(source.shape[0], source.shape[2], width_of(self.model))
        logits, _ = self.decode(input_ids, states, encoder_attention_mask, past.shape[0], given)
        return logits


def width_of(model: nn.Module) -> int:
    """Width of what an encoder gives."""
    return int(model.config.d_model)  # type: ignore[union-attr, arg-type]


def hears(model: nn.Module) -> bool:
    """Whether a model's encoder takes mel features."""
    return getattr(model, "main_input_name", "input_ids") == SPEECH


def traced(model: nn.Module, trace: AttentionTrace, half: Half) -> Traced:
    """A half, ready for `torch.export`.

    Args:
        model: with its placeholders in place.
        trace: of its attention; filled while the module runs.
        half: which.

    Raises:
        UnsupportedError: no keys of cross-attention go through the model's cache.
    """
    samples = _source(model)
    encoder = (_SpeechEncoder if hears(model) else _TextEncoder)(model, trace, half.cross)
    layers = _cross_layers(model, trace, samples) if half.cross or half.name == "decoder" else []
    if half.name == "encoder":
        made = [MADE.format(layer, part) for layer in range(len(layers) // 2) for part in PARTS] if half.cross else []
        dynamic = {name: {0: _ANY} if name == SPEECH else {0: _ANY, 1: _ANY} for name in samples}
        return Traced(encoder, samples, dynamic, tuple(samples), ("last_hidden_state", *made))
    arguments: dict[str, Any] = {
        "input_ids": torch.zeros(_BATCH, _NEW, dtype=torch.long),
        PAST: torch.zeros(_LENGTH),
    }
    axes: dict[str, Any] = {"input_ids": {0: _ANY, 1: _ANY}, PAST: {0: _ANY}}
    if not hears(model):
        arguments[MASK] = torch.ones(_BATCH, _SOURCE, dtype=torch.long)
        axes[MASK] = {0: _ANY, 1: _ANY}
    names = tuple(arguments)
    if half.cross:
        arguments["given"] = [torch.zeros(_BATCH, heads, _SOURCE, width) for heads, width in layers]
        axes["given"] = [{0: _ANY, 2: _ANY} for _ in layers]
        names = (*names, *(GIVEN.format(layer, part) for layer in range(len(layers) // 2) for part in PARTS))
    else:
        arguments[STATES] = torch.zeros(_BATCH, _SOURCE, width_of(model))
        axes[STATES] = {0: _ANY, 1: _ANY}
        names = (*names, STATES)
    return Traced(_Decoder(model, trace), arguments, axes, names, ("logits",))


def _source(model: nn.Module) -> dict[str, Tensor]:
    """What an encoder takes."""
    if not hears(model):
        shape = _BATCH, _SOURCE
        return {
            "input_ids": torch.zeros(shape, dtype=torch.long),
            "attention_mask": torch.ones(shape, dtype=torch.long),
        }
    config: Any = model.config
    stride = 1
    for module in model.get_encoder().modules():  # type: ignore[operator]
        if isinstance(module, nn.Conv1d):
            stride *= int(module.stride[0])
    return {SPEECH: torch.zeros(_BATCH, config.num_mel_bins, config.max_source_positions * stride)}


def _cross_layers(model: nn.Module, trace: AttentionTrace, samples: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """Heads and width of every tensor that passes between the halves, found by letting the decoder run once."""
    trace.start()
    with torch.no_grad():
        states = torch.zeros(_BATCH, _SOURCE, width_of(model))
        mask = None if hears(model) else samples["attention_mask"]
        _, passed = _Pair(model, trace).decode(torch.zeros(_BATCH, 1, dtype=torch.long), states, mask, 0, None)
    trace.start()
    if not passed.made:
        raise UnsupportedError(f"{type(model).__name__}: no keys of cross-attention go through the model's cache")
    if sorted(passed.made) != list(range(len(passed.made))):
        raise UnsupportedError(f"{type(model).__name__}: only some of the decoder's layers look at the encoder")
    return [(part.shape[1], part.shape[3]) for layer in sorted(passed.made) for part in passed.made[layer]]
