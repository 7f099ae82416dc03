"""The halves of a model with an encoder and a decoder as modules that block_call.py can run: samples by their number.

    EncoderAlone    numbers [b, 1] ──▶ the encoder on those sources
    DecoderAlone    numbers [b, 1] ──▶ the decoder on those answers, looking at what the encoder gave of their sources

A decoder's block is called with what the encoder gave, which differs from sample to sample.  It therefore rides behind
the hidden states, [b, S + E, H]: block_call.py cuts it off, gives it to the block, and puts it back behind the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from ._patches import forwards
from .block_call import BlockCall
from .blocks import Stack, halves_of
from .output_head import returned_beside


class EncoderAlone(nn.Module):
    """The encoder on sources by their number.

    Args:
        model: the whole model.
        sources: its encoder's argument by name, samples along the first axis.
    """

    main_input_name = "input_ids"

    def __init__(self, model: nn.Module, sources: dict[str, Tensor]) -> None:
        super().__init__()
        self.encoder = halves_of(model)[0]
        self._sources = sources

    def forward(self, input_ids: Tensor) -> Tensor:
        """Its last hidden states [b, E, H]."""
        numbers = input_ids[:, 0]
        found: Tensor = self.encoder(**{name: values[numbers] for name, values in self._sources.items()})[0]
        return found


class DecoderAlone(nn.Module):
    """The decoder on answers by their number.

    Args:
        model: the whole model.
        states: what the encoder gave, [n, E, H].
        answers: token ids [n, S].

    Attributes:
        carried: what the blocks of the last forward looked at.
    """

    main_input_name = "input_ids"

    def __init__(self, model: nn.Module, states: Tensor, answers: Tensor) -> None:
        super().__init__()
        self.model = model
        self._states, self._answers = states, answers
        self.carried: Tensor | None = None

    def forward(self, input_ids: Tensor) -> Any:
        """The model's output."""
        numbers = input_ids[:, 0]
        self.carried = self._states[numbers]
        return self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=self.carried),
            decoder_input_ids=self._answers[numbers],
            use_cache=False,
        )


def numbers_of(count: int) -> Tensor:
    """The numbers of samples, in the form that these modules take."""
    return torch.arange(count)[:, None]


def finished_states(
    encoder: EncoderAlone, stack: Stack, call: BlockCall, hidden: Tensor, out: Tensor, batch_size: int
) -> None:
    """What the encoder gives where hidden states leave its last block: through the norm behind it.

    Args:
        encoder: the encoder.
        stack: its blocks.
        call: how the last one is called.
        hidden: what leaves it, [n, E, H].
        out: filled, [n, E, H].
        batch_size: samples at a time.
    """
    rest = returned_beside(stack.blocks[-1], call, hidden[:1])
    current = [hidden]

    def instead(*_: Any, **__: Any) -> Any:
        return current[0] if rest is None else (current[0], *rest)

    numbers = numbers_of(len(hidden))
    with forwards(stack.blocks, instead), torch.no_grad():
        for start in range(0, len(hidden), batch_size):
            part = slice(start, start + batch_size)
            current[0] = hidden[part]
            out[part] = encoder(numbers[part])
