"""Hidden states on their way through an encoder and a decoder, the decoder's on what the encoder gives.

    encoder's blocks   hidden states [n, E, H] of the sources
    behind the last    through the norm that follows it, on both sides: what the float encoder gives, and the quantized
    decoder's blocks   hidden states [n, S + E, H]: those of the answers, and behind them what the encoder gave, which
                       every block looks at (model/half_runs.py)

So a decoder's block is tuned on what the quantized encoder gives it, and aims at what the float model makes of the
float encoder's.  The step between the halves is taken when the encoder's last block is done and before that is
recorded: what a run resumes from is always what enters a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from roundexport.calibration.answers import split_sample
from roundexport.model.block_call import BlockCall, capture_calls, first_hidden
from roundexport.model.blocks import Part, Stack
from roundexport.model.half_runs import DecoderAlone, EncoderAlone, finished_states, numbers_of

from .block_states import BlockStates
from .hidden_states import Hidden

if TYPE_CHECKING:
    from roundexport.calibration.samples import Calibration

    from .checkpointing import TuneState
    from .job import Job


class HalfStates:
    """Takes hidden states to the first block of each half.

    Args:
        job: the run.
        state: what is done already.
        calibration: the samples.
        rounded: values of what lies outside the blocks as it was rounded, by parameter name.
    """

    def __init__(self, job: Job, state: TuneState, calibration: Calibration, rounded: Mapping[str, Tensor]) -> None:
        self._job, self._state, self._rounded = job, state, rounded
        ids = torch.from_numpy(calibration.ids)
        source, self._answers = split_sample(job.checkpoint, ids)
        features = calibration.features
        self._sources = {"input_ids": source} if features is None else {"input_features": torch.from_numpy(features)}
        self._numbers = numbers_of(len(ids))
        self._encoder = EncoderAlone(job.model, self._sources)
        stack = job.plan.stack
        self._halves = [
            Stack((Part(part.name, 0, part.stop - part.start),), stack.blocks[part.start : part.stop])
            for part in stack.parts
        ]

    def begin(self) -> BlockStates:
        """What enters the block that is next."""
        done, first = self._state.blocks_done, len(self._halves[0].blocks)
        earlier = self._state.hidden()
        if earlier is not None:
            return self._encoding(earlier) if done < first else self._decoding(earlier)
        width = first_hidden(self._encoder, self._halves[0], self._numbers[:1], 1)
        hidden = self._state.begin_hidden(0, (len(self._numbers), *width.shape[1:]))
        self._first(self._encoder, self._halves[0], hidden, hidden.floats, hidden.quantized)
        return self._encoding(hidden)

    def ends_encoder(self, index: int) -> bool:
        """Whether a block is the encoder's last."""
        return index + 1 == len(self._halves[0].blocks)

    def leaving(self, hidden: Hidden) -> Hidden:
        """A file for what leaves the encoder's last block; :meth:`crossed` removes it."""
        samples, length, width = hidden.floats.shape
        return Hidden.create(self._state.folder / "hidden-encoder.safetensors", (samples, length, width), {})

    def crossed(self, left: Hidden, call: BlockCall) -> BlockStates:
        """What enters the decoder's first block.

        Args:
            left: what leaves the encoder's last block.
            call: how that is called.
        """
        job, (samples, source, width) = self._job, left.floats.shape
        length = self._answers.shape[1]
        index = len(self._halves[0].blocks)
        hidden = self._state.begin_hidden(index, (samples, length + source, width))
        states = hidden.floats[:, length:], hidden.quantized[:, length:]
        last = self._encoder, self._halves[0], call
        finished_states(*last, left.floats, states[0], job.batch_size)
        with job.weights.replaced(self._rounded):
            finished_states(*last, left.quantized, states[1], job.batch_size)
        decoder = DecoderAlone(job.model, states[0], self._answers)
        self._first(decoder, self._halves[1], hidden, hidden.floats[:, :length], hidden.quantized[:, :length])
        left.path.unlink()
        return self._decoding(hidden)

    def _first(
        self, module: EncoderAlone | DecoderAlone, half: Stack, hidden: Hidden, floats: Tensor, quantized: Tensor
    ) -> None:
        """Fill both sides of what enters a half's first block."""
        arguments = module, half, self._numbers, self._job.batch_size
        first_hidden(*arguments, floats, hidden.drop)
        with self._job.weights.replaced(self._rounded):
            first_hidden(*arguments, quantized, hidden.drop)

    def _encoding(self, hidden: Hidden) -> BlockStates:
        calls = capture_calls(self._encoder, self._halves[0], self._numbers)
        return BlockStates(calls, torch.ones(hidden.floats.shape[:2]), hidden)

    def _decoding(self, hidden: Hidden) -> BlockStates:
        length = self._answers.shape[1]
        decoder = DecoderAlone(self._job.model, hidden.floats[:, length:], self._answers)
        calls = capture_calls(decoder, self._halves[1], self._numbers)
        mask = torch.ones(hidden.floats.shape[:2])
        special = self._job.checkpoint.tokens
        if special["pad"] is not None:
            mask[:, 1:length][self._answers[:, 1:] == special["pad"]] = 0
        mask[:, length - 1] = 0
        return BlockStates([*calls[:1] * len(self._halves[0].blocks), *calls], mask, hidden)
