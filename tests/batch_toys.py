"""Prompts and what answers them alone, for tests of answers that are written together."""

from __future__ import annotations

import numpy as np
import runtime_toys as toys

from roundexport.runtime import Decoder, GenerationSettings

GREEDY = GenerationSettings(max_new_tokens=12, ignore_eos=True)


def tokens(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([length, seed]).integers(2, toys.VOCAB, length).tolist()  # type: ignore[no-any-return]


def alone(decoder: Decoder, prompt: list[int], count: int = 12) -> list[int]:
    return decoder.greedy([prompt], count)[0].tolist()  # type: ignore[no-any-return]
