"""The verb `convert` with ``--part all``: both parts of a vision-language model, and packages that hold both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from roundexport.progress import Progress

from . import printing
from .shared_options import LOADING

if TYPE_CHECKING:
    from roundexport.tuning.settings import TuneSettings


def convert_parts(  # noqa: PLR0913  (the parameters are the verb's flags)
    model: str,
    out: Path,
    settings: TuneSettings,
    *,
    to: str | None,
    text: Path | None,
    max_kl: float | None,
    min_top1: float | None,
    min_cosine: float | None,
    json: bool,
) -> None:
    """Convert and print; see `convert_whole`."""
    with Progress(not json) as shown:
        with shown.stage(LOADING):
            from roundexport.conversion.vision_language import convert_whole
        done = convert_whole(
            model, out, settings, to=to, text=text, max_kl=max_kl, min_top1=min_top1, min_cosine=min_cosine,
            progress=shown,
        )  # fmt: skip
    if json:
        printing.document(done.to_json())
    else:
        for part in done.parts.values():
            printing.converted(part)
        for name, package in done.packages.items():
            printing.line(f"{package}: reads text and pictures, {name}")
    printing.check_gates_held(done.parts.values())
