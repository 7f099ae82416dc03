"""Answers that a model with an encoder and a decoder writes to sources."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from roundexport.calibration.answers import _drawn

EOS, PAD = 3, 7


class Ending(torch.nn.Module):
    """Writes token 5 until a row's own place, then an end of sequence; counts how often it is asked."""

    def __init__(self, ends: list[int]) -> None:
        super().__init__()
        self.ends, self.place, self.asked = ends, 0, 0

    def get_encoder(self) -> Any:
        return lambda input_ids: (input_ids[..., None].float(),)

    def forward(self, decoder_input_ids: torch.Tensor, past_key_values: Any = None, **_: Any) -> SimpleNamespace:
        self.asked, self.place = self.asked + 1, self.place + decoder_input_ids.shape[1]
        tokens = torch.tensor([EOS if self.place >= end else 5 for end in self.ends])
        logits = torch.full((len(tokens), decoder_input_ids.shape[1], 9), -1e9)
        logits[torch.arange(len(tokens)), -1, tokens] = 0
        return SimpleNamespace(logits=logits, past_key_values=self.place)


def test_nothing_is_asked_for_once_every_answer_has_ended() -> None:
    model = Ending([2, 4])
    sources = {"input_ids": torch.ones(2, 6, dtype=torch.long)}
    found = _drawn(model, sources, [0], 400, torch.Generator(), (EOS,), PAD)
    assert found.shape == (2, 400) and model.asked == 4
    assert found[:, :6].tolist() == [[0, 5, EOS, PAD, PAD, PAD], [0, 5, 5, 5, EOS, PAD]]
    assert (found[:, 6:] == PAD).all()
