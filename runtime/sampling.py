"""Choosing the next token of one row: greedy without a softmax, sampling without sorting the vocabulary.

The order of the cuts is the usual one (that of transformers), after what changes logits:

    grammar → logit bias → repetition, presence, frequency penalty → temperature → top_k → top_p → min_p → draw

with p = softmax(logits / temperature).  top_p keeps the fewest likeliest tokens whose probabilities reach top_p, min_p
those with p ≥ min_p · max p; the likeliest always stays.  Sorting V logits takes longer than the graph of a small
model, so nothing is sorted that need not be: a draw without cuts takes tokens in order of their ids, top_k sorts only
what the maxima of blocks let through, and top_p only what is likely enough to matter.

Each row draws from its own generator, seeded by (seed, row), so that a row's tokens do not depend on its neighbors.
Log-probabilities that are told are those of the model, softmax of its untouched logits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .settings import GenerationSettings
from .types import Floats, Ids

_BLOCK = 256  # weights that are summed at once
_SMALL = 32  # logits of which the largest is known


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
        tokens, weights = candidates(logits, self._settings)
        at = drawn(weights, self._random.random())
        return at if tokens is None else int(tokens[at])

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


def drawn(weights: Floats, share: float) -> int:
    """The index at which the running sum of weights [n] passes a share, 0 ≤ share < 1, of their total.

    Sums of blocks come first and a running sum inside one of them after, as one over all takes ten times as long.
    """
    reached = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64).cumsum()
    wanted = share * reached[-1]
    block = min(int(np.searchsorted(reached, wanted, side="right")), len(reached) - 1)
    begin, before = block * _BLOCK, reached[block - 1] if block else 0.0
    inside = weights[begin : begin + _BLOCK].cumsum(dtype=np.float64)
    at = int(np.searchsorted(inside, wanted - before, side="right"))
    if at == len(inside):  # by rounding
        return int(np.flatnonzero(weights[: begin + _BLOCK])[-1])
    return begin + at


def candidates(logits: Floats, settings: GenerationSettings) -> tuple[Ids | None, Floats]:
    """Tokens that sampling may choose from, and what they weigh under softmax before its division.

    Args:
        logits: float32 [V].
        settings: temperature above 0; top_k, top_p, min_p.

    Returns:
        int64 [n] token ids, likeliest first where top_k or top_p cuts, else by id, None standing for all of them; and
        float32 [n] weights, the likeliest token's being 1; that of a token which a grammar forbids is 0.
    """
    tokens = largest(logits, settings.top_k) if 0 < settings.top_k < len(logits) else None
    weights = _weights(logits if tokens is None else logits[tokens], settings.temperature)
    if settings.top_p < 1:
        total = float(weights.sum(dtype=np.float64))
        if tokens is None:
            tokens = _contenders(weights, settings.top_p, total)
            weights = weights[tokens]
        keep = int(np.searchsorted(weights.cumsum(dtype=np.float64), settings.top_p * total)) + 1
        tokens, weights = tokens[:keep], weights[:keep]
    if settings.min_p > 0:
        kept = np.flatnonzero(weights >= settings.min_p)
        tokens, weights = (kept if tokens is None else tokens[kept]), weights[kept]
    return tokens, weights


def _contenders(weights: Floats, top_p: float, total: float) -> Ids:
    """Tokens among which are all that top_p keeps, likeliest first; of equal ones the lower id.

    Those that weigh less than (1 − top_p) · total / V weigh together no more than top_p leaves out: they need no order.
    Mostly far fewer are enough, so the bound comes down to that in steps.
    """
    bound, least = 1.0, (1 - top_p) * total / len(weights)
    while True:
        bound = max(bound / 8, least)
        likely = np.flatnonzero(weights >= bound)
        if bound == least or weights[likely].sum(dtype=np.float64) >= top_p * total:
            break
    return likely[np.argsort(-weights[likely], kind="stable")]


def largest(logits: Floats, count: int) -> Ids:
    """Indices of the ``count`` largest logits [V], largest first; equal logits in order of their index.

    The count-th largest of the blocks' maxima has that many logits at or above it, so only those are sorted.
    """
    blocks = len(logits) // _SMALL
    if count >= blocks:
        return np.argsort(-logits, kind="stable")[:count].astype(np.int64)
    most = logits[: blocks * _SMALL].reshape(blocks, _SMALL).max(1)
    found = np.flatnonzero(logits >= np.partition(most, blocks - count)[blocks - count])
    return found[np.argsort(-logits[found], kind="stable")[:count]].astype(np.int64)


def told(logits: Floats, token: int, count: int) -> Choice:
    """A token with its log-probability, and the likeliest ``count`` tokens with theirs, under softmax(logits)."""
    top = logits.max()
    normalizer = float(top) + float(np.log(np.exp((logits - top).astype(np.float64)).sum()))
    best = largest(logits, count) if count else np.zeros(0, np.int64)
    return Choice(
        token, float(logits[token]) - normalizer, tuple((int(t), float(logits[t]) - normalizer) for t in best)
    )


def _weights(logits: Floats, temperature: float) -> Floats:
    """exp((logits − max) / temperature): softmax before its division, the likeliest token at 1."""
    weights: Floats = np.exp((logits - logits.max()) / np.float32(temperature))
    return weights
