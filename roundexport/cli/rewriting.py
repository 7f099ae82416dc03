"""The verb `rewrite`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import typer
from numpy.typing import NDArray

from roundexport.errors import UsageError
from roundexport.progress import Progress

from . import printing
from .shared_options import LOADING, Json, MaxRam

if TYPE_CHECKING:
    from roundexport.rewriting.rewrite import Rewriting


def rewrite(  # noqa: PLR0913, PLR0917
    graph: Annotated[Path, typer.Argument(help="A float graph, .onnx or .xml, or a folder with one.")],
    artifact: Path,
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    model: Annotated[str | None, typer.Option(help="The float model, if no longer where the artifact says.")] = None,
    dialect: Annotated[
        Literal["onnxruntime", "standard"],
        typer.Option(help="ONNX: MatMulNBits, or DequantizeLinear and MatMul for any runtime (opset 21)."),
    ] = "onnxruntime",
    partial: Annotated[bool, typer.Option("--partial", help="Leave layers float that are not in the graph.")] = False,
    inputs: Annotated[
        Path | None, typer.Option(help="Inputs to compare outputs on, .npz by name; else they are made up.")
    ] = None,
    max_ram: MaxRam = None,
    json: Json = False,
) -> None:
    """Put an artifact's integers into a float ONNX or OpenVINO graph that another exporter made, and prove them."""
    given = _read(inputs)
    with Progress() as shown:
        with shown.stage(LOADING):
            from roundexport.rewriting.rewrite import rewrite as run
        done = run(
            graph, artifact, out, model=model, dialect=dialect, partial=partial, inputs=given, max_ram=max_ram,
            progress=shown,
        )  # fmt: skip
    if json:
        printing.document(done.to_json())
    else:
        _print(out, done)


def _read(path: Path | None) -> dict[str, NDArray[Any]]:
    if path is None:
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise UsageError(f"--inputs {path}: no .npz file of plain arrays: {error}") from error


def _print(out: Path, done: Rewriting) -> None:
    sizes = f"{done.bytes_before / 2**20:.1f} MiB -> {done.bytes_after / 2**20:.1f} MiB"
    printing.line(f"{out / done.graph}: {len(done.layers)} layers equal to the artifact, {sizes}")
    printing.line(f"  {done.outputs}")
    packed = sum(len(layers) > 1 for _, _, layers in done.places)
    printing.line(f"  replaced {len(done.places)} readers of weights, {packed} of them packed")
    for name, first in done.twins:
        printing.line(f"  same     {name} is {first} over again")
    for name in done.changed_floats[:2]:
        printing.line(f"  changed  {name} and what else tuning changed ({len(done.changed_floats)} in all)")
        break
    for name, why in done.missing:
        printing.line(f"  float    {name}: {why}")
