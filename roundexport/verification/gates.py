"""Gates: figures that a package has to reach, by task: KL and top-1 where there are logits, else the cosine."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from roundexport.errors import UsageError
from roundexport.types import HEADLESS

from .report import DecoderQuality, EncoderQuality, Quality


@dataclass(frozen=True)
class Gates:
    """Figures that a package has to reach; None: whatever it is.

    Args:
        max_kl: mean KL, nats per token, or over the labels of a head.
        min_top1: agreement of the likeliest token or label, 0 to 1.
        min_cosine: mean cosine of an encoder's vectors.

    Raises:
        UsageError: a gate that no figure could decide.
    """

    max_kl: float | None = None
    min_top1: float | None = None
    min_cosine: float | None = None

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("max-kl", self.max_kl, 0, sys.float_info.max),
            ("min-top1", self.min_top1, 0, 1),
            ("min-cosine", self.min_cosine, -1, 1),
        ):
            if value is not None and not least <= value <= most:
                bounds = "0 or more" if most > 1 else f"from {least} to {most}"
                raise UsageError(f"--{name} must be {bounds}, not {value}")

    def check(self, task: str) -> None:
        """Refuse a gate that the task has no figure for, before any work.

        Raises:
            UsageError: there is one.
        """
        if task in HEADLESS and (self.max_kl is not None or self.min_top1 is not None):
            raise UsageError(
                "--max-kl and --min-top1 are gates for decoders and heads; use --min-cosine for an encoder"
            )
        if task not in HEADLESS and self.min_cosine is not None:
            raise UsageError("--min-cosine is a gate for encoders; use --max-kl or --min-top1 where there are logits")

    def failures(self, quality: Quality) -> tuple[str, ...]:
        """Gates that did not hold, one sentence each; figures that are no numbers are a failure without a gate."""
        loss = quality.cosine if isinstance(quality, EncoderQuality) else quality.kl
        if not math.isfinite(loss.mean):
            return (f"the loss is {loss.mean}: the package, or the float model, gave values that are not finite",)
        if isinstance(quality, EncoderQuality):
            low = self.min_cosine is not None and not quality.cosine.mean >= self.min_cosine
            return (f"mean cosine {quality.cosine.mean:.5f} is below --min-cosine {self.min_cosine}",) if low else ()
        missed = []
        if self.max_kl is not None and not quality.kl.mean <= self.max_kl:
            missed.append(f"mean KL {quality.kl.mean:.5f} nats is above --max-kl {self.max_kl}")
        same = quality.top1 if isinstance(quality, DecoderQuality) else quality.agreement
        if self.min_top1 is not None and not same.mean >= self.min_top1:
            missed.append(f"top-1 agreement {same.mean:.4f} is below --min-top1 {self.min_top1}")
        return tuple(missed)
