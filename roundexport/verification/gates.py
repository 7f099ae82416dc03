"""Gates: figures that a package has to reach, by task: KL and top-1 where there are logits, else the cosine."""

from __future__ import annotations

import sys

from roundexport.errors import UsageError
from roundexport.types import HEADLESS

from .report import DecoderQuality, EncoderQuality, Quality


def check_gates(
    task: str, max_kl: float | None = None, min_top1: float | None = None, min_cosine: float | None = None
) -> None:
    """Refuse a gate that the task has no figure for, or that no figure could decide, before any work."""
    for name, value, least, most in (("max-kl", max_kl, 0, sys.float_info.max), ("min-top1", min_top1, 0, 1),
                                     ("min-cosine", min_cosine, -1, 1)):  # fmt: skip
        if value is not None and not least <= value <= most:
            raise UsageError(f"--{name} must be {'0 or more' if most > 1 else f'from {least} to {most}'}, not {value}")
    if task in HEADLESS and (max_kl is not None or min_top1 is not None):
        raise UsageError("--max-kl and --min-top1 are gates for decoders and heads; use --min-cosine for an encoder")
    if task not in HEADLESS and min_cosine is not None:
        raise UsageError("--min-cosine is a gate for encoders; use --max-kl or --min-top1 where there are logits")


def failures(
    quality: Quality, max_kl: float | None, min_top1: float | None, min_cosine: float | None
) -> tuple[str, ...]:
    """Gates that did not hold, one sentence each."""
    if isinstance(quality, EncoderQuality):
        low = min_cosine is not None and not quality.cosine.mean >= min_cosine
        return (f"mean cosine {quality.cosine.mean:.5f} is below --min-cosine {min_cosine}",) if low else ()
    missed = []
    if max_kl is not None and not quality.kl.mean <= max_kl:
        missed.append(f"mean KL {quality.kl.mean:.5f} nats is above --max-kl {max_kl}")
    same = quality.top1 if isinstance(quality, DecoderQuality) else quality.agreement
    if min_top1 is not None and not same.mean >= min_top1:
        missed.append(f"top-1 agreement {same.mean:.4f} is below --min-top1 {min_top1}")
    return tuple(missed)
