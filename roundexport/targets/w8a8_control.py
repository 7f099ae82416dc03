"""Accuracy control of 8-bit weights and activations: the linears that hurt most go back to floats.

    figure   mean cosine between the float package's and the quantized package's vectors (mean of the last hidden
             states), over samples that no range was taken from
    wanted   at least `Allowance.cosine`: --min-cosine, or USUAL

Where the figure is lower, every linear is made float again alone, and they are then reverted for good in the order of
what that gained, until the figure is reached.  What is bounded is the loss on these samples: `verify` says what other
texts lose.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.errors import UsageError

USUAL = 0.99
_EVERY, _MOST = 4, 32  # every fourth sample is for the figure, so many at most


@dataclass(frozen=True)
class Allowance:
    """Samples for a tool, and what it may lose.

    Args:
        ids: samples [S, T].
        cosine: the least mean cosine to the float package's vectors.

    Raises:
        UsageError: a cosine that is not between -1 and 1.
    """

    ids: NDArray[np.int64]
    cosine: float = USUAL

    def __post_init__(self) -> None:
        if not -1 <= self.cosine < 1:
            raise UsageError(f"the least cosine of a quantized package is below 1 and at least -1, found {self.cosine}")

    @property
    def for_ranges(self) -> NDArray[np.int64]:
        """Samples that ranges are taken from."""
        if len(self.ids) < _EVERY:
            return self.ids
        ranges: NDArray[np.int64] = self.ids[np.arange(len(self.ids)) % _EVERY != _EVERY - 1]
        return ranges

    @property
    def for_figure(self) -> NDArray[np.int64]:
        """Samples that the figure is measured on; those of the ranges only where there are fewer than four."""
        return (self.ids if len(self.ids) < _EVERY else self.ids[_EVERY - 1 :: _EVERY])[:_MOST]


def sentence_vector(hidden: NDArray[Any]) -> NDArray[np.float32]:
    """The mean of a sample's hidden states [1, T, C], at length 1."""
    vector = np.asarray(hidden, np.float32)[0].mean(0)
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-30), np.float32)


def cosines(found: Iterable[NDArray[np.float32]], wanted: Iterable[NDArray[np.float32]]) -> list[float]:
    """Cosine of each pair of vectors of length 1; -1 where one is not finite."""
    products = [float(a @ b) for a, b in zip(found, wanted, strict=True)]
    return [value if np.isfinite(value) else -1.0 for value in products]


def reverted_until(
    layers: Sequence[str], figure: Callable[[Collection[str]], float], least: float
) -> tuple[tuple[str, ...], float]:
    """The layers that go back to floats, and the figure that is then reached.

    Args:
        layers: in 8 bits now.
        figure: the figure with these layers float.
        least: that is wanted.
    """
    reached = figure(())
    if reached >= least:
        return (), reached
    ranked = sorted(layers, key=lambda name: figure((name,)), reverse=True)
    reverted: list[str] = []
    while reached < least and ranked:
        reverted.append(ranked.pop(0))
        reached = figure(reverted)
    return tuple(reverted), reached
