"""What verification found, as values: a figure with its standard error, the figures of a task, the report of a package.

Standard errors are over windows (or texts), not tokens: tokens of one window are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundexport.formats.verification_record import joined

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Figure:
    """A mean with the standard error of that mean."""

    mean: float
    stderr: float

    @classmethod
    def over(cls, values: Floats) -> Figure:
        """Mean and standard error of independent values [n]."""
        values = np.asarray(values, np.float64)
        spread = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
        return cls(float(values.mean()), float(spread))

    @classmethod
    def ratio(cls, values: Sequence[float], others: Sequence[float]) -> Figure:
        """Mean of values over mean of others, measured on the same windows, by the delta method.

        Raises:
            ValueError: not as many values as others.
        """
        ours, theirs = np.asarray(values, np.float64), np.asarray(others, np.float64)
        if ours.shape != theirs.shape:
            raise ValueError(
                f"{len(ours)} values cannot be paired with {len(theirs)}; measure both on the same windows"
            )
        share = float(ours.mean() / theirs.mean())
        return cls(share, cls.over(ours - share * theirs).stderr / float(theirs.mean()))

    def __str__(self) -> str:
        return f"{self.mean:.5f} ± {self.stderr:.5f}"


@dataclass(frozen=True)
class Histogram:
    """How many values lie where, on a logarithmic axis; the values themselves are not kept.

    Args:
        edges: increasing; four to a decade.
        counts: one more than edges: below the first, between neighbors, at or above the last.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def over(cls, values: Floats) -> Histogram:
        """Of values of any shape, from a millionth to ten."""
        edges = np.asarray([float(f"{10 ** (quarter / 4):.4g}") for quarter in range(-24, 5)])
        places = np.searchsorted(edges, np.asarray(values).ravel(), side="right")
        counts = np.bincount(places, minlength=len(edges) + 1)
        return cls(tuple(edges.tolist()), tuple(counts.tolist()))


@dataclass(frozen=True)
class DecoderQuality:
    """Loss of a decoder package against its float model; nats, shares and token counts.

    ``kl_windows`` is the mean KL of every window, so that packages verified on the same text can be paired
    (:meth:`Figure.ratio`).
    """

    windows: int
    tokens: int
    kl: Figure
    kl_p99: float
    kl_max: float
    top1: Figure
    perplexity_float: float
    perplexity: float
    nll_float: Figure
    nll: Figure
    first_divergence: tuple[int, ...]
    divergence_horizon: int
    kl_histogram: Histogram | None = None
    kl_windows: tuple[float, ...] = ()


@dataclass(frozen=True)
class EncoderQuality:
    """Loss of an encoder package against its float model."""

    texts: int
    cosine: Figure
    cosine_min: float
    rank_correlation: float
    same_neighbour: float


@dataclass(frozen=True)
class HeadQuality:
    """Loss of a package with a head against its float model; see heads.py."""

    texts: int
    labels: int
    agreement: Figure
    logit_error: Figure
    kl: Figure


Quality = DecoderQuality | EncoderQuality | HeadQuality


@dataclass(frozen=True)
class ProductLoss:
    """What activations in eight bits cost one product, nats per token.

    Args:
        layers: that it computes; several where they read one input.
        kl: between the package with float32 activations everywhere, and with those of this product in eight bits.
    """

    layers: tuple[str, ...]
    kl: Figure

    @property
    def label(self) -> str:
        """Its layers, what their names have in common said once: ``model.layers.0.mlp.gate_proj, up_proj``."""
        return joined(self.layers)


@dataclass(frozen=True)
class ActivationCost:
    """What activations in eight bits cost a decoder's package; see activations.py.

    Args:
        tokens: that were compared.
        together: KL between the package with float32 activations, and with those of all products in eight bits.
        products: each alone, the most expensive first.
        spared: layers whose activations are in float32 as the package ships.
    """

    tokens: int
    together: Figure
    products: tuple[ProductLoss, ...]
    spared: tuple[str, ...] = ()

    @property
    def added(self) -> float:
        """What the products cost, each alone."""
        return sum(product.kl.mean for product in self.products)


@dataclass(frozen=True)
class QualityReport:
    """What `verify` found.

    Args:
        package: the folder.
        against: the float model's location.
        text: where the held-out text came from.
        engine: what ran the package, with its effective precisions.
        quality: figures by task.
        integers_checked: layers whose integers were read back and equal the artifact's; None: no artifact was given.
        failures: gates that failed, one sentence each.
        activations: what activations in eight bits cost each product; None: it was not asked.
        text_sha256: of what is in the held-out text, or in a folder; None: it was drawn, or written by the model.
    """

    package: str
    against: str
    text: str
    engine: dict[str, Any]
    quality: Quality
    integers_checked: int | None = None
    failures: tuple[str, ...] = field(default=())
    activations: ActivationCost | None = None
    text_sha256: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return asdict(self)
