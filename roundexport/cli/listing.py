"""The verb `list`: what there is of a kind; of families, what each came to when it was tried, or trying them here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from roundexport.errors import GateError, UsageError
from roundexport.progress import Progress

from . import printing
from .shared_options import Json

Kind = Literal["algorithms", "targets", "importers", "exporters", "devices", "kernels", "engines", "families"]


def list_names(
    kind: Kind,
    names: Annotated[list[str] | None, typer.Argument(help="Families by name; default: all.")] = None,
    prove: Annotated[
        bool, typer.Option("--prove", help="Families: try them here, each in a process of its own, not what ships.")
    ] = False,
    to: Annotated[str, typer.Option(help="With --prove: targets, comma-separated.")] = "onnx,openvino",
    record: Annotated[
        Path | None,
        typer.Option(
            help="With --prove: a JSON file that every row is kept in as it comes; all families but those it has are "
            "tried.  Without: the table in it instead of the one that ships."
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Families: print a page of documentation.")] = False,
    json: Json = False,
) -> None:
    """List what there is of a kind, one name per line; of families, what each came to on both targets."""
    if kind == "families":
        _families(names or [], to if prove else None, record, markdown, json)
        return
    if names or prove or record or markdown:
        raise UsageError(f"names, --prove, --record and --markdown are for `list families`, not for {kind}")
    found = _devices() if kind == "devices" else _described(kind)
    if json:
        printing.document(found)
    else:
        for name, about in found.items():
            printing.line(f"{name:12s} {about}")


def _families(names: list[str], to: str | None, record: Path | None, markdown: bool, json: bool) -> None:
    from roundexport.families.configurations import chosen
    from roundexport.families.table import Table, proven
    from roundexport.families.table import markdown as page

    wanted = chosen(names)
    if to is None:
        table = proven() if record is None else Table.read(record)
    else:
        from roundexport.conversion.asked_targets import Asked
        from roundexport.families.proving import Prover, missing, prove_all

        targets = Asked.of(to).names
        left = wanted if names else missing(wanted, targets, record)
        with Progress() as shown:
            table = prove_all(left, targets, Prover("roundexport.families.trial"), record, shown)
    table = table.only(names)
    if json:
        printing.document(table.to_json())
    elif markdown:
        print(page(table), end="")
    else:
        printing.table(table.printed())
        printing.line(table.summary())
        print(table.made_with, file=sys.stderr)
    failed = [row.family for row in table.rows if any(o.state == "failed" for o in row.outcomes.values())]
    if to is not None and failed:
        raise GateError(f"neither right nor refused: {', '.join(failed)}")


def _described(kind: str) -> dict[str, str]:
    from roundexport import plugins

    found = {}
    for name in plugins.names(kind):
        try:
            found[name] = (plugins.load(kind, name).__doc__ or "").strip().split("\n")[0]
        except ImportError as error:
            found[name] = f"(cannot be imported: {error.name or error})"
    return found


def _devices() -> dict[str, str]:
    from roundexport.runtime.machine import describe_devices

    return describe_devices()
