"""`generate` with a package that answers a text with a text: what applies to it, and its answer printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from roundexport.errors import UsageError

from . import printing

if TYPE_CHECKING:
    from roundexport.runtime.settings import GenerationSettings


def translates(package: Path) -> bool:
    """Whether a package answers a text with a text."""
    from roundexport.formats.package import read_package

    return read_package(package, check_hashes=False).task == "translate"


def translate(  # noqa: PLR0913  (the parameters are the verb's flags)
    package: Path,
    text: str,
    settings: GenerationSettings,
    *,
    beams: int | None,
    engine: str,
    device: str,
    threads: int | None,
    properties: Mapping[str, str],
    json: bool,
) -> None:
    """Answer a text and print the answer.

    Raises:
        UsageError: settings that are for decoders.
    """
    from roundexport.runtime.loading import load
    from roundexport.runtime.translation import Translator
    from roundexport.runtime.vendor_loop import beyond_plain

    wrong = [name.replace("_", "-") for name in beyond_plain(settings)] + (["stop"] if settings.stop else [])
    if wrong:
        raise UsageError(f"{package} answers texts with beams; --{', --'.join(wrong)} are for decoders")
    translator = load(package, engine=engine, device=device, threads=threads, properties=properties)
    assert isinstance(translator, Translator)
    (answer,) = translator.translate([text], max_new_tokens=settings.max_new_tokens, beams=beams)
    if json:
        printing.document(asdict(answer))
    else:
        printing.line(answer.text)
