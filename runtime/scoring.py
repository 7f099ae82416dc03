"""How likely a given text is: log-probability of each of its tokens behind those before it.

    log p(t_i | t_0 … t_{i−1}) = logits_{i−1}[t_i] − log Σ exp logits_{i−1}        for i ≥ 1; the first token has none

The text is read in pieces, so that logits of a long one ([S, V] float32) need not fit in memory at once, and so that
whoever shares the engine gets a turn between pieces.  Sums over i are what benchmarks of multiple choice compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .sampling import Choice, told
from .types import DecoderBackend

PIECE = 128  # tokens


def scored(backend: DecoderBackend, tokens: Sequence[int], alternatives: int) -> Iterator[list[Choice]]:
    """The second token and all that follow, with their log-probabilities, piece by piece.

    Args:
        backend: the opened graph.
        tokens: of the text.
        alternatives: likeliest tokens to tell at each place.
    """
    with backend.start(rows=1, expected=len(tokens)) as session:
        [row] = session.add()
        for start in range(0, len(tokens) - 1, PIECE):
            piece = tokens[start : min(start + PIECE, len(tokens) - 1)]
            followers = tokens[start + 1 : start + 1 + len(piece)]
            logits = session.scores(row, piece)
            yield [told(values, token, alternatives) for values, token in zip(logits, followers, strict=True)]
