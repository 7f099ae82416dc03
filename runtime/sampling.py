"""Choosing the next token from logits: greedy without a softmax, sampling on a short list of candidates.

The order of the cuts is the usual one (that of transformers):

    repetition penalty → temperature → top_k → top_p → min_p → draw

with p = softmax(logits / temperature).  top_p keeps the fewest likeliest tokens whose probabilities reach top_p, min_p
those with p ≥ min_p · max p; the likeliest always stays.  Instead of sorting V logits, the few hundred largest are
taken by partition and sorted; only where their probability falls short of top_p is the whole row sorted.

Each row draws from its own generator, seeded by (seed, row), so that a row's tokens do not depend on its neighbors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .types import Floats, GenerationSettings, Ids

_SHORT_LIST = 512


class Sampler:
    """Picks tokens for the rows of one batch.

    Args:
        settings: the knobs.
        prompts: token ids per row, for the repetition penalty.
    """

    def __init__(self, settings: GenerationSettings, prompts: Sequence[Sequence[int]]) -> None:
        self._settings = settings
        self._random = [np.random.default_rng([settings.seed, row]) for row in range(len(prompts))]
        self._seen = [set(prompt) for prompt in prompts] if settings.repetition_penalty != 1 else None

    def pick(self, logits: Floats) -> Ids:
        """Token ids [B] chosen from logits [B, V]; the logits are not changed."""
        if self._seen is None and self._settings.temperature == 0:
            return np.asarray(logits.argmax(-1), np.int64)
        tokens = np.array([self._pick_row(row, logits[row]) for row in range(len(logits))], np.int64)
        if self._seen is not None:
            for seen, token in zip(self._seen, tokens, strict=True):
                seen.add(int(token))
        return tokens

    def _pick_row(self, row: int, logits: Floats) -> int:
        if self._seen is not None:
            logits = penalised(logits, self._seen[row], self._settings.repetition_penalty)
        if self._settings.temperature == 0:
            return int(logits.argmax())
        tokens, probabilities = candidates(logits, self._settings)
        point = self._random[row].random() * probabilities.sum()
        return int(tokens[np.searchsorted(probabilities.cumsum(), point, side="right").clip(max=len(tokens) - 1)])


def penalised(logits: Floats, seen: set[int], penalty: float) -> Floats:
    """A copy of logits [V] in which tokens already seen are less likely (penalty > 1)."""
    ids = np.fromiter(seen, np.int64, len(seen))
    out = logits.copy()
    chosen = out[ids]
    out[ids] = np.where(chosen > 0, chosen / penalty, chosen * penalty)
    return out


def candidates(logits: Floats, settings: GenerationSettings) -> tuple[Ids, NDArray[np.float64]]:
    """Tokens that sampling may choose, likeliest first, and their probabilities (not summing to one after cuts).

    Args:
        logits: float32 [V].
        settings: temperature above 0; top_k, top_p, min_p.

    Returns:
        int64 [n] token ids and float64 [n] probabilities under softmax over what top_k kept.
    """
    limit = min(settings.top_k or len(logits), len(logits))
    cut = settings.top_k > 0 or settings.top_p < 1
    tokens = largest(logits, min(limit, _SHORT_LIST) if cut else len(logits))
    weights = _weights(logits[tokens], logits[tokens[0]], settings.temperature)
    total = weights.sum() if len(tokens) == limit else _weights(logits, logits[tokens[0]], settings.temperature).sum()
    if len(tokens) < limit and (settings.top_k or weights.sum() < settings.top_p * total):
        tokens = largest(logits, limit)
        weights = _weights(logits[tokens], logits[tokens[0]], settings.temperature)
        total = weights.sum()
    keep = len(tokens)
    if settings.top_p < 1:
        keep = int(np.searchsorted(weights.cumsum(), settings.top_p * total)) + 1
    if settings.min_p > 0:
        keep = min(keep, int(np.count_nonzero(weights >= settings.min_p)))
    return tokens[:keep], weights[:keep] / total


def largest(logits: Floats, count: int) -> Ids:
    """Indices of the ``count`` largest logits [V], largest first; equal logits in order of their index."""
    if count < len(logits):
        found = np.sort(np.argpartition(logits, len(logits) - count)[-count:])
        return found[np.argsort(-logits[found], kind="stable")].astype(np.int64)
    return np.argsort(-logits, kind="stable").astype(np.int64)


def _weights(logits: Floats, top: np.float32, temperature: float) -> NDArray[np.float64]:
    """exp((logits − top) / temperature): softmax before its division, the likeliest token at 1."""
    return np.exp((logits.astype(np.float64) - top) / temperature)
