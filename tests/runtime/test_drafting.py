"""Guessing ahead on many prompts: not one greedy token changes, with prompt lookup or a draft package, on both engines.

Runs of one token and of several add float32 products in another order; with ``precise`` that never changes the
likeliest token of these toys.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import runtime_toys as toys

from roundexport.errors import UsageError
from roundexport.runtime import Decoder, GenerationSettings
from roundexport.runtime.batch import Batch, Drafter
from roundexport.runtime.writing import drafter_for, load_decoder

PROMPTS = 50
# Draft packages: the same weights with a 4-bit head, mostly right; the package itself, always right; other weights.
PAIRS = [("ort", "ort-int4"), ("ort", "ov"), ("ov", "ov"), ("ov", "ort")]


def written(decoder: Decoder, drafter: Drafter | None) -> tuple[list[list[int]], float, float]:
    """Tokens of every prompt, tokens per run, and the share of guesses that were kept."""
    random, found, runs, guessed, kept = np.random.default_rng(0), [], 0, 0, 0
    settings = GenerationSettings(max_new_tokens=24, ignore_eos=True)
    for number in range(PROMPTS):
        phrase = random.integers(2, toys.VOCAB, 3 + number % 9).tolist()
        answer = decoder.answer(phrase * (1 + number % 3), settings)
        batch = Batch(decoder.backend, drafter=drafter)
        batch.admit(answer)
        while len(batch):
            batch.advance()
        batch.close()
        found.append(answer.new_tokens)
        runs, guessed, kept = runs + batch.counts.runs, guessed + batch.counts.guessed, kept + batch.counts.accepted
    return found, 24 * PROMPTS / runs, kept / max(guessed, 1)


@pytest.mark.parametrize(("package", "draft"), PAIRS)
def test_greedy_tokens_of_fifty_prompts_are_the_same(toy: Callable[[str], Path], package: str, draft: str) -> None:
    decoder = load_decoder(toy(package), threads=1, precise=True)
    plain, per_run, _ = written(decoder, None)
    assert per_run == 1
    looked, per_run, _ = written(decoder, drafter_for(decoder, None, True))
    assert looked == plain and per_run >= 1
    guessed, per_run, kept = written(decoder, drafter_for(decoder, toy(draft), False, threads=1, precise=True))
    assert guessed == plain
    if package == draft:
        assert kept > 0.99 and per_run > 4
    elif draft == "ort-int4":
        assert kept > 0.5 and per_run > 2


def test_lookup_and_a_draft_together_are_refused(toy: Callable[[str], Path]) -> None:
    decoder = load_decoder(toy("ort"), threads=1)
    with pytest.raises(UsageError, match="choose one"):
        drafter_for(decoder, toy("ort"), True)
    with pytest.raises(UsageError, match="name one as draft"):
        drafter_for(decoder, None, True, properties={"A": "B"})
