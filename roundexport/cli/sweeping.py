"""The verb `sweep`: models converted in many ways, and what no other package beats in size, speed and loss."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from roundexport.errors import RoundexportError, UsageError
from roundexport.progress import Progress
from roundexport.tuning.setting_field import none_or_int
from roundexport.tuning.settings import TuneSettings

from . import printing
from .options import set_threads, takes_settings_but
from .shared_options import LOADING, Cluster, HeldOut, Json, Threads, listed

_COLUMNS = (
    "model", "recipe", "bits", "group", "target", "bits per weight", "MiB", "loss", "top-1", "per second", "frontier",
)  # fmt: skip


@takes_settings_but("recipe", "bits", "group_size")
def sweep(  # noqa: PLR0913, PLR0917
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="Folders, GGUF files or hub ids.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to make, or to go on in.")],
    settings: TuneSettings,
    recipes: Annotated[str, typer.Option(help="Comma-separated: rtn, light, default, best.")] = "default",
    bits: Annotated[str, typer.Option(help="Comma-separated: 2, 3, 4, 8.")] = "4",
    group_sizes: Annotated[str, typer.Option(help="Comma-separated: 16, 32, 64, 128, 256, none.")] = "128",
    to: Annotated[str, typer.Option(help="Targets, comma-separated.")] = "onnx",
    text: HeldOut = None,
    speed: Annotated[bool, typer.Option(help="Also time the packages, in turn, when all are made.")] = True,
    cluster: Cluster = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Convert models by every recipe, bit width and group size; ends in a table of what no other package beats."""
    set_threads(threads)
    with Progress() as shown:
        with shown.stage(LOADING):
            from roundexport.sweeps.entry import sweep as run
            from roundexport.sweeps.grid import Axes
        groups = tuple(none_or_int(word, "--group-sizes") for word in _words(group_sizes, "--group-sizes"))
        axes = Axes(tuple(_words(recipes, "--recipes")), tuple(listed(bits, "--bits", int)), groups)
        made = run(
            models, out, settings, axes=axes, to=_words(to, "--to"), text=text, speed=speed, cluster=cluster,
            progress=shown,
        )  # fmt: skip
    if json:
        printing.document(made.to_json())
    else:
        printing.table([{name: row[name] for name in _COLUMNS} for row in made.rows])
        for path in made.reports:
            printing.line(f"{path}")
    if made.failed:
        name, why = next(iter(made.failed.items()))
        raise RoundexportError(f"{len(made.failed)} of the runs failed; {name}: {why}")


def _words(given: str, option: str) -> list[str]:
    words = [word.strip() for word in given.split(",") if word.strip()]
    if not words:
        raise UsageError(f"{option} must name at least one value, separated by commas")
    return words
