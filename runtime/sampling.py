"""Choosing the next token of one row: greedy without a softmax, sampling on a short list of candidates.

The order of the cuts is the usual one (that of transformers), after what changes logits:

    grammar → logit bias → repetition, presence, frequency penalty → temperature → top_k → top_p → min_p → draw

with p = softmax(logits / temperature).  top_p keeps the fewest likeliest tokens whose probabilities reach top_p, min_p
those with p ≥ min_p · max p; the likeliest always stays.  Instead of sorting V logits, the few hundred largest are
taken by partition and sorted; only where their probability falls short of top_p is the whole row sorted.

Each row draws from its own generator, seeded by (seed, row), so that a row's tokens do not depend on its neighbors.
Log-probabilities that are told are those of the model, softmax of its untouched logits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .settings import GenerationSettings
from .types import Floats, Ids

_SHORT_LIST = 512


@dataclass(frozen=True)
class Choice:
    """A chosen token.

    Args:
        token: its id.
        logprob: its log-probability under the model; None unless asked for.
        top: the likeliest tokens and their log-probabilities, likeliest first; as many as asked for.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class TokenMask(Protocol):
    """Which tokens may come next; see grammar.py."""

    def restrict(self, logits: Floats) -> Floats:
        """Logits [V] in which tokens that may not come are −inf; the given ones are not changed."""

    def accept(self, token: int) -> None:
        """Go on behind a token."""

    @property
    def ended(self) -> str | None:
        """Why nothing may follow (``stop``, ``length``); None while something may."""


class Sampler:
    """Chooses the tokens of one row.

    Args:
        settings: the knobs.
        prompt: the row's tokens so far, for the repetition penalty.
        row: its number in the batch, for the draw.
        mask: which tokens may come; None: all.
    """

    def __init__(
        self, settings: GenerationSettings, prompt: Sequence[int] = (), row: int = 0, mask: TokenMask | None = None
    ) -> None:
        self._settings = settings
        self._random = np.random.default_rng([settings.seed, row])
        self._mask = mask
        self._seen = set(prompt) if settings.repetition_penalty != 1 else None
        self._counts = Counter[int]() if settings.presence_penalty or settings.frequency_penalty else None
        bias = settings.logit_bias
        self._biased = (np.array(list(bias), np.int64), np.array(list(bias.values()), np.float32)) if bias else None
        self._plain = self._seen is None and self._counts is None and self._biased is None and mask is None

    def choose(self, logits: Floats) -> Choice:
        """A token chosen from logits [V], which are not changed; the next call goes on behind it."""
        token = self._pick(logits if self._plain else self._changed(logits))
        if self._seen is not None:
            self._seen.add(token)
        if self._counts is not None:
            self._counts[token] += 1
        if self._mask is not None:
            self._mask.accept(token)
        return Choice(token) if self._settings.logprobs is None else told(logits, token, self._settings.logprobs)

    def _pick(self, logits: Floats) -> int:
        if self._settings.temperature == 0:
            return int(logits.argmax())
        tokens, probabilities = candidates(logits, self._settings)
        point = self._random.random() * probabilities.sum()
        return int(tokens[np.searchsorted(probabilities.cumsum(), point, side="right").clip(max=len(tokens) - 1)])

    def _changed(self, logits: Floats) -> Floats:
        """A copy of the logits under everything but temperature and cuts."""
        out: Floats = logits.copy() if self._mask is None else self._mask.restrict(logits)
        if self._biased is not None:
            tokens, bias = self._biased
            out[tokens] += bias
        if self._seen is not None:
            out = penalized(out, self._seen, self._settings.repetition_penalty)
        if self._counts:
            tokens = np.fromiter(self._counts, np.int64, len(self._counts))
            times = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            out[tokens] -= self._settings.presence_penalty + self._settings.frequency_penalty * times
        return out


def penalized(logits: Floats, seen: set[int], penalty: float) -> Floats:
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
    keep = int(
        np.count_nonzero(weights)
    )  # a token that a grammar forbids has none, and is not drawn by rounding either
    if settings.top_p < 1:
        keep = min(keep, int(np.searchsorted(weights.cumsum(), settings.top_p * total)) + 1)
    if settings.min_p > 0:
        keep = min(keep, int(np.count_nonzero(weights >= settings.min_p)))
    return tokens[:keep], weights[:keep] / total


def largest(logits: Floats, count: int) -> Ids:
    """Indices of the ``count`` largest logits [V], largest first; equal logits in order of their index."""
    if count < len(logits):
        found = np.sort(np.argpartition(logits, len(logits) - count)[-count:])
        return found[np.argsort(-logits[found], kind="stable")].astype(np.int64)
    return np.argsort(-logits, kind="stable").astype(np.int64)


def told(logits: Floats, token: int, count: int) -> Choice:
    """A token with its log-probability, and the likeliest ``count`` tokens with theirs, under softmax(logits)."""
    top = logits.max()
    normalizer = float(top) + float(np.log(np.exp((logits - top).astype(np.float64)).sum()))
    best = largest(logits, count) if count else np.zeros(0, np.int64)
    return Choice(
        token, float(logits[token]) - normalizer, tuple((int(t), float(logits[t]) - normalizer) for t in best)
    )


def _weights(logits: Floats, top: np.float32, temperature: float) -> NDArray[np.float64]:
    """exp((logits − top) / temperature): softmax before its division, the likeliest token at 1."""
    return np.exp((logits.astype(np.float64) - top) / temperature)
