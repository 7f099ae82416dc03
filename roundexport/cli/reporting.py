"""The verb `report`: what packages are, what they lost, how fast they are: one HTML file, or their model cards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from roundexport.errors import UsageError

from . import printing
from .shared_options import Json


def report(
    packages: Annotated[list[Path], typer.Argument(metavar="PACKAGE…", help="Package folders, side by side.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The HTML file.  [default: report.html]")] = None,
    bench: Annotated[list[Path] | None, typer.Option(help="A record of `bench --json`; may be repeated.")] = None,
    artifact: Annotated[
        list[Path] | None, typer.Option(help="The packages' artifact, where it is not beside them; may be repeated.")
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="Write README.md in every package instead.")] = False,
    json: Json = False,
) -> None:
    """Report on packages: one HTML file that needs no network, or the model card in each."""
    from roundexport.reports.writing import write_cards, write_report

    if card and out is not None:
        raise UsageError("--card writes README.md in every package; it does not go with --out")
    if card:
        written = write_cards(packages, bench=bench or (), artifacts=artifact or ())
    else:
        written = [out or Path("report.html")]
        write_report(packages, written[0], bench=bench or (), artifacts=artifact or ())
    if json:
        printing.document([{"file": str(path), "bytes": path.stat().st_size} for path in written])
    else:
        for path in written:
            printing.line(f"{path}: {path.stat().st_size / 1024:.0f} KiB")
